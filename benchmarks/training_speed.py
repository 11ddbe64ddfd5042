"""What bfloat16 and the fused step of AdamW save of an epoch of fine-tuning on a processor.

    python benchmarks/training_speed.py --out benchmarks/results/training_speed.json

Random samples, one thread, seconds of the processor. The four ways take turns, epoch by epoch, so that a busy machine
slows all alike; medians are told, and each way's share of the epoch in float32 with a plain step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from digits import DigitsNet

import ray_nascomp as nc
from ray_nascomp.pipeline import precision
from ray_nascomp.pipeline.training import Trainer
from ray_nascomp.plan import FinetuneStage

WAYS = list(itertools.product(("float32", "bfloat16"), ("plain step", "fused step")))


def digits() -> nc.Task:
    """The demo's network."""
    data = torch.rand(1024, 1, 8, 8), torch.randint(10, (1024,))
    return nc.Task(DigitsNet(), data, data)


def resnet() -> nc.Task:
    """ResNet-10 at half its width on images of 28 x 28, with transformers' coarse first convolution."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        num_labels=10,
    )
    data = torch.rand(512, 1, 28, 28), torch.randint(10, (512,))
    return nc.Task(ResNetForImageClassification(config), data, data, batch_size=64)


def minilm() -> nc.Task:
    """A BERT of MiniLM's six layers of 384 on sentences of 32 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    inputs = {"input_ids": torch.randint(1, 30000, (64, 32)), "attention_mask": torch.ones(64, 32, dtype=torch.long)}
    data = inputs, torch.randint(2, (64,))
    return nc.Task(BertForSequenceClassification(config), data, data, batch_size=32)


NETWORKS: dict[str, Callable[[], nc.Task]] = {"digits": digits, "resnet": resnet, "minilm": minilm}


def epochs(task: nc.Task, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way's epochs; the first round warms up and does not count."""
    stage = FinetuneStage()
    macs = nc.CostModel(task)({})["macs"]
    seconds: dict[str, list[float]] = {}
    for number, (arithmetic, step) in itertools.product(range(rounds + 1), WAYS):
        # A network of no multiplications is too small for bfloat16.
        trainer = Trainer(task, stage, rounds + 1, 0, macs if arithmetic == "bfloat16" else 0)
        optimizer_class, arguments = trainer.optimizer_settings
        trainer.optimizer_settings = optimizer_class, {**arguments, "fused": step == "fused step"}
        network = task.model
        optimizer = trainer.make_optimizer(network)
        trainer.epoch(network, optimizer, 0)  # An optimizer's first step allocates its moments.
        start = time.process_time()
        trainer.epoch(network, optimizer, 0)
        if number:
            seconds.setdefault(f"{arithmetic}, {step}", []).append(time.process_time() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record = {}
    for name, make in NETWORKS.items():
        measured = epochs(make(), arguments.rounds)
        medians = {way: statistics.median(seconds) for way, seconds in measured.items()}
        plain = medians["float32, plain step"]
        record[name] = {
            way: {"seconds": round(median, 4), "share": round(median / plain, 3)} for way, median in medians.items()
        }
        print(name, {way: figures["share"] for way, figures in record[name].items()}, flush=True)
    arguments.out.write_text(json.dumps({"bfloat16": precision._has_bfloat16(), "epochs": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
