"""What one would do instead of a joint search, from the same original, with the same data and the same training.

Uniform pruning and NNI's AGP go through the plans of ray-nascomp: neither torch-pruning nor NNI writes a
smaller file of a network with recurrent layers or integers by itself, so they get all help that there is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from baseline import rows_of
from measuring import Judged, compare, judge, names_of
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rivals import hypervolumes, optuna_search, sequence_search
from study import Study

import ray_nascomp as nc
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.tasks.calling import tensors_of

Made = tuple[bytes, Mapping[str, float]]
"""A model's file, and its params and macs."""

_SPARSITIES = np.round(np.arange(0.05, 0.95, 0.05), 2)


def carry_out_alternatives(study: Study) -> dict[str, Any]:
    """Adds the alternatives to a study's result; those that are there already are not done again.

    Of some models ONNX Runtime's own quantization makes no file that runs; it is left out then, with a message.
    """
    target = study.folder / "result.json"
    record = json.loads(target.read_text())
    original: Judged | None = None
    for name, make in ALTERNATIVES.items():
        if name in record["models"]:
            continue
        if original is None:
            original = judge(study.whole.content, study.splits.test, study.whole.metrics)
        try:
            content, counts = make(study, original)
        except NoFileError as error:
            print(f"{name}: ONNX Runtime makes no file that runs: {error}", flush=True)
            continue
        # What is made of the original's file takes its inputs.
        test = study.splits.test if name in _OF_THE_ORIGINAL else study.test
        record["models"][name] = compare(original, judge(content, test, counts), test)
        record["hypervolume"] = hypervolumes(study)
        study.keep(name, content)
        target.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return record


class NoFileError(Exception):
    """ONNX Runtime's quantization fails, or makes a file that does not run."""


class _Batches(CalibrationDataReader):
    """Training samples one by one, as ONNX Runtime's calibration takes them."""

    def __init__(self, study: Study, names: Sequence[str]) -> None:
        inputs, targets = study.splits.train
        self._batches: Iterator[dict[str, np.ndarray]] = (
            {
                name: tensor.numpy()
                for name, tensor in zip(names, tensors_of(rows_of(inputs, slice(low, low + 32))).values(), strict=True)
            }
            for low in range(0, min(512, len(targets)), 32)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def runtime_int8(study: Study, original: Judged, *, is_static: bool) -> Made:
    """ONNX Runtime's quantization of the original, prepared and by channel as its guide recommends.

    With attention, layers alone are quantized: the arithmetic of T5's tables of positions does not survive it.

    Raises:
        NoFileError: If nothing comes of it that runs.
    """
    try:
        content = _quantized(study, original.content, is_static=is_static)
        sample = rows_of(study.splits.train[0], slice(1))
        run_session(make_session(content), sample, names_of(sample, content))
    except Exception as error:  # Of any kind: it is another library's doing.
        raise NoFileError(error) from error
    return content, original.figures


def _quantized(study: Study, content: bytes, *, is_static: bool) -> bytes:
    with TemporaryDirectory() as folder:
        plain, ready, done = (Path(folder, file) for file in ("plain.onnx", "ready.onnx", "done.onnx"))
        plain.write_bytes(content)
        has_attention = any(node.op_type == "Attention" for node in onnx.load(plain).graph.node)
        # ONNX Runtime's own inference of symbolic shapes does not know ONNX's Attention.
        quant_pre_process(plain, ready, skip_symbolic_shape=has_attention)
        layers = ["MatMul", "Gemm"] if has_attention else None
        if is_static:
            batches = _Batches(study, study.task.input_names)
            quantize_static(ready, done, batches, per_channel=True, op_types_to_quantize=layers)
        else:
            quantize_dynamic(ready, done, per_channel=True, op_types_to_quantize=layers)
        return done.read_bytes()


def pruned_int8(study: Study, original: Judged, *, folder: str, method: str, schedule: str) -> Made:
    """One sparsity for all channels, the smallest that keeps to the limits, then 8 bits after training."""
    costs, limits = nc.CostModel(study.task), study.budget.limits
    for sparsity in _SPARSITIES:
        config = {
            "prune": {"method": method, "sparsity": {"*": float(sparsity)}, "schedule": schedule, "round_to": 8},
            "finetune": {"lr": study.budget.learning_rate},
            "quantize": {"method": "ptq", "bits": {"*": 8}},
        }
        known = costs(config)
        fits = known["params"] <= limits.params * original.figures["params"]
        if fits and known["size_ratio"] >= 1 / limits.size:
            break
    return _finished(study, study.finish(config, folder, is_taught=False), folder)


def in_sequence(study: Study, original: Judged) -> Made:
    """The preferred result of a search in sequence."""
    return _chosen(study, sequence_search(study), "sequence")


def with_optuna(study: Study, original: Judged) -> Made:
    """The preferred result of Optuna's."""
    return _chosen(study, optuna_search(study), "optuna")


def _chosen(study: Study, results: nc.Results, prefix: str) -> Made:
    name, metrics = study.choose(results, prefix)
    return _finished(study, metrics, name)


def _finished(study: Study, metrics: Mapping[str, float], folder: str) -> Made:
    return (study.folder / folder / "model.onnx").read_bytes(), metrics


_OF_THE_ORIGINAL: dict[str, Callable[[Study, Judged], Made]] = {
    "ONNX Runtime's static int8": partial(runtime_int8, is_static=True),
    "ONNX Runtime's dynamic int8": partial(runtime_int8, is_static=False),
}
ALTERNATIVES: dict[str, Callable[[Study, Judged], Made]] = {
    **_OF_THE_ORIGINAL,
    "uniform pruning, then int8": partial(pruned_int8, folder="uniform", method="l2_norm", schedule="one_shot"),
    "NNI's AGP, then PTQ": partial(pruned_int8, folder="agp", method="l1_norm", schedule="agp"),
    "search in sequence": in_sequence,
    "Optuna's TPE, same space": with_optuna,
}
