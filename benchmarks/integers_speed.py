"""What simulated integers cost an epoch of training, in NNI's own passes over each tensor and in fewer.

    python benchmarks/integers_speed.py --out benchmarks/results/integers_speed.json

Random samples, one thread, float32, seconds of the processor, all layers in 8 bits. The ways take turns, epoch by
epoch, so that a busy machine slows all alike; medians are told, and each way's multiple of an epoch in floating point.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from nni.compression.quantization import LsqPlusQuantizer, LsqQuantizer, QATQuantizer
from training_speed import NETWORKS

import ray_nascomp as nc
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.nni_adapter import quantization
from ray_nascomp.nni_adapter.evaluator import TrainingFunction, train_on
from ray_nascomp.nni_adapter.lsq import Lsq, LsqPlus
from ray_nascomp.nni_adapter.quantization import QuantizationSession
from ray_nascomp.nni_adapter.quantizers import Qat
from ray_nascomp.tasks.calling import call

SGD = (torch.optim.SGD, {"lr": 1e-4})


class NniQat(Qat):
    """QAT with NNI's own passes."""

    register_qat_apply_method = QATQuantizer.register_qat_apply_method
    track_min_max_val = QATQuantizer.track_min_max_val
    update_scale_zp = QATQuantizer.update_scale_zp


class NniLsq(Lsq):
    """LSQ with NNI's own passes."""

    register_lsq_apply_method = LsqQuantizer.register_lsq_apply_method


class NniLsqPlus(LsqPlus):
    """LSQ+ with NNI's own passes."""

    register_lsq_plus_apply_method = LsqPlusQuantizer.register_lsq_plus_apply_method


WAYS: dict[str, tuple[str, Any]] = {
    "qat, NNI": ("qat", NniQat),
    "qat": ("qat", Qat),
    "lsq, NNI": ("lsq", NniLsq),
    "lsq": ("lsq", Lsq),
    "lsq_plus, NNI": ("lsq_plus", NniLsqPlus),
    "lsq_plus": ("lsq_plus", LsqPlus),
}


def in_floating_point(task: nc.Task) -> Callable[[], None]:
    """A function that trains for one epoch."""
    network = copy.deepcopy(task.model)
    optimizer = SGD[0](network.parameters(), **SGD[1])
    return lambda: one_epoch(task)(network, optimizer, lambda batch, model: task.loss(call(model, batch[0]), batch[1]))


def in_integers(task: nc.Task, method: str, quantizer: Any) -> Callable[[], None]:
    """A function that trains for one epoch with simulated integers."""
    network = copy.deepcopy(task.model).eval()
    fold_batch_norm(network, task.example_inputs)
    bits = dict.fromkeys((layer.name for layer in task.spec.compressible_layers), 8)
    quantization.QUANTIZERS[method] = quantizer
    return QuantizationSession(network, task, bits, {}, one_epoch(task), SGD, method=method).train_epoch


def one_epoch(task: nc.Task) -> TrainingFunction:
    """Training on the same batches every time."""
    return lambda model, optimizer, step: train_on(task.train_batches(0))(model, optimizer, step)


def measured(task: nc.Task, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each way's epochs, and their multiples; the first round warms up and does not count."""
    epochs = {"floating point": in_floating_point(task)}
    epochs |= {way: in_integers(task, method, quantizer) for way, (method, quantizer) in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in epochs}
    for _ in range(rounds + 1):
        for way, epoch in epochs.items():
            start = time.process_time()
            epoch()
            seconds[way].append(time.process_time() - start)
    medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    plain = medians["floating point"]
    return {way: {"seconds": round(m, 3), "times": round(m / plain, 2)} for way, m in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record = {}
    for name, make in NETWORKS.items():
        record[name] = measured(make(), arguments.rounds)
        print(name, {way: figures["times"] for way, figures in record[name].items()}, flush=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
