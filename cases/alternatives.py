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
from ray.tune.search.optuna import OptunaSearch
from study import Study

import ray_nascomp as nc
from ray_nascomp.builders import gentle_config
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.pareto import normalised_hypervolume
from ray_nascomp.searchers import HybridSearch
from ray_nascomp.tasks.calling import tensors_of

Made = tuple[bytes, Mapping[str, float]]
"""A model's file, and its params and macs."""

_STAGES = (("architecture",), ("prune", "low_rank"), ("quantize",))
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
    return _finished(study, study.finish(config, folder), folder)


def in_sequence(study: Study, original: Judged) -> Made:
    """First the architecture is searched, then what is removed, then the bits, with the same trials in all."""
    space: dict[str, Any] = {**study.space}
    start = gentle_config(study.space)
    for number, stage in enumerate(_STAGES):
        fixed = {key: start[key] if key in start and key not in stage else space[key] for key in space}
        results = study.search(
            _stage_name(number),
            lambda: HybridSearch(study.goal, nc.CostModel(study.task), seed=study.seed),
            {key: _merged(space[key], fixed[key]) for key in space},
            max(1, study.budget.trials // len(_STAGES)),
        )
        (best,) = study.best_of(results, 1)
        start = {**start, **{key: best.config[key] for key in stage if key in best.config}}
    return _chosen(study, results, "sequence")


def _merged(domains: Any, values: Any) -> Any:
    """A part of the space in which the values that are given are fixed."""
    if isinstance(domains, Mapping) and isinstance(values, Mapping):
        return {key: _merged(domain, values[key]) if key in values else domain for key, domain in domains.items()}
    return values


def with_optuna(study: Study, original: Judged) -> Made:
    """Optuna's sampler (TPE) on the same space; it sees the score that every trial reports."""
    results = study.search(
        "optuna",
        lambda: OptunaSearch(metric="score", mode="max", seed=study.seed),
        study.space,
        study.budget.trials,
    )
    return _chosen(study, results, "optuna")


def hypervolumes(study: Study) -> dict[str, float]:
    """What share of their common box the results within the limits dominate, of each search that is done.

    A search in sequence counts with the results of all its stages.
    """
    goal = study.goal
    searches = {"joint": ["search"], "sequence": [*map(_stage_name, range(len(_STAGES)))], "optuna": ["optuna"]}
    losses = {
        name: [
            goal.losses(trial.metrics)
            for folder in folders
            for trial in nc.Results(study.folder / folder, goal).trials
            if trial.status == "completed" and goal.is_feasible(trial.metrics)
        ]
        for name, folders in searches.items()
        if all(study.is_searched(folder) for folder in folders)
    }
    every = np.concatenate([np.reshape(rows, (-1, len(goal.objectives))) for rows in losses.values()])
    if not len(every):
        return dict.fromkeys(losses, 0.0)
    box = every.min(axis=0), every.max(axis=0)
    return {name: normalised_hypervolume(np.array(rows), *box) if rows else 0.0 for name, rows in losses.items()}


def _stage_name(number: int) -> str:
    return f"sequence_{number}"


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
