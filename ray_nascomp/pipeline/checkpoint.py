"""A run on disk, without pickle: model.onnx, model.safetensors and manifest.json.

The manifest holds what rebuilds the network before its weights are loaded: the plan and the
indices of the removed channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_nascomp.deployment.runtime import Latency
from ray_nascomp.errors import ConfigError
from ray_nascomp.pipeline.measure import Artifact, Quality
from ray_nascomp.pipeline.report import goal_of
from ray_nascomp.pipeline.snapshot import Snapshot
from ray_nascomp.plan import CompressionPlan
from ray_nascomp.tasks.calling import tensors_of

if TYPE_CHECKING:
    from ray_nascomp.pipeline.run import CompressionRun
    from ray_nascomp.tasks.base import Task

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
_FIRST_FILE = "first.onnx"
_FORMAT = 1


def save_run(run: CompressionRun, folder: Path) -> None:
    """Writes the run as it is now."""
    folder.mkdir(parents=True, exist_ok=True)
    snapshot = Snapshot({}, {"removed": None, "ranks": {}, "is_prepared": False, "smoothed": {}, "calibration": {}})
    if run.candidate is not None:
        optimizer = run.optimizer if not run.is_done else None
        snapshot = Snapshot.of(run.candidate, run.costs.ranks(run.plan), run.trainer, optimizer)
    examples = {
        f"example.{name}": value.detach().cpu().clone().contiguous()
        for name, value in _example_inputs(run.task).items()
    }
    save_file(snapshot.tensors | (examples if run.candidate is not None else {}), folder / WEIGHTS_FILE)
    if run.artifact is not None:
        (folder / MODEL_FILE).write_bytes(run.artifact.content)
    first = run._first
    if first is not None and not run.is_done:
        (folder / _FIRST_FILE).write_bytes(first.content)
    manifest = {
        "format": _FORMAT,
        "config": run.config,
        "epochs": run.epochs,
        "train_samples": len(run.task.train_data),
        "steps_done": run.steps_done,
        "metrics": run.metrics,
        "goal": json.loads(goal_of(run.task, run.goal).to_json()),
        "task": run.task.fingerprint,
        "input_names": list(run.task.input_names),
        "transformers": _described_model(run.task),
        **snapshot.facts,
        "outputs": run.outputs,
        "seconds": run.seconds,
        "continued": run.is_continued,
        "first": _artifact_facts(first) if first is not None else None,
        "layers": _layer_table(run),
        "versions": {name: version(name) for name in ("ray-nascomp", "torch", "nni", "onnxruntime")},
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, default=str))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a saved run.

    Raises:
        ConfigError: If the folder holds none that can be read.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder} holds no readable {MANIFEST_FILE}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ConfigError(f"{path} is not a manifest of format {_FORMAT}")
    return manifest


def read_saved(task: Task, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a saved run.

    Raises:
        ConfigError: If the folder is not a saved run of this task.
    """
    manifest = read_manifest(folder)
    if manifest["task"] != task.fingerprint:
        raise ConfigError(f"{folder} was made from another task ({manifest['task']} instead of {task.fingerprint})")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    return manifest, tensors


def restore_run(run: CompressionRun, folder: Path) -> None:
    """Brings a fresh run to where the saved one was.

    Raises:
        ConfigError: If the folder is not a saved run of this task.
    """
    manifest, tensors = read_saved(run.task, folder)
    run.steps_done = manifest["steps_done"]
    run.metrics = manifest["metrics"]
    run.seconds = manifest["seconds"]
    run.outputs = manifest["outputs"]
    if manifest["continued"]:
        run.forget_recipe()
    run._infeasible = not run.metrics.get("feasible", True)
    if manifest["removed"] is not None:
        snapshot = Snapshot(tensors, manifest)
        run.candidate = snapshot.candidate(run.task, run.plan)
        run.trainer.masks = run.candidate.masks
        run.optimizer = snapshot.optimizer(run.trainer, run.candidate.network)
    facts = manifest["first"]
    if facts is not None and not run.is_done:
        run._first = Artifact(
            (folder / _FIRST_FILE).read_bytes(),
            Quality(**facts["quality"]),
            facts["error"],
            Latency(**facts["latency"]),
        )


def nested(tensors: Mapping[str, Tensor]) -> Any:
    """Inputs of a model that were saved by name: a tensor, a tuple or a dict of tensors."""
    if all(name.isdigit() for name in tensors):
        values = tuple(tensors[name] for name in sorted(tensors, key=int))
        return values[0] if len(values) == 1 else values
    return dict(tensors)


def _example_inputs(task: Task) -> dict[str, Tensor]:
    """Inputs of two samples, from which a loader traces the network."""
    inputs = task.example_inputs
    if isinstance(inputs, Mapping):
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return {str(index): value for index, value in enumerate(tensors_of(inputs).values())}


def _described_model(task: Task) -> dict[str, Any] | None:
    """Class and config of a model of transformers; None for any other."""
    kind = type(task.model)
    if not kind.__module__.startswith("transformers."):
        return None
    config: Any = task.model.config
    return {"class": kind.__name__, "config": config.to_dict()}


def _artifact_facts(artifact: Artifact) -> dict[str, Any]:
    return {"quality": vars(artifact.quality), "error": artifact.error, "latency": vars(artifact.latency)}


def _layer_table(run: CompressionRun) -> list[dict[str, Any]]:
    """Each layer before and after, for reports."""
    if run.candidate is None:
        return []
    candidate = run.candidate
    before = {cost.name: cost for cost in run.costs.layers(CompressionPlan())}
    channels, original_channels = (
        {layer.name: layer.weight_shape[0] for layer in spec.layers if layer.weight_shape}
        for spec in (candidate.spec, run.task.spec)
    )
    table = []
    for cost in run.costs.layers(run.plan):
        original = before.get(cost.name)
        group = candidate.spec.group_of(cost.name)
        sparsity = len(candidate.removed.get(group.name, [])) / group.width if group else 0.0
        table.append(
            {
                "name": cost.name,
                "type": cost.kind,
                "params_before": original.params if original else 0,
                "params_after": cost.params,
                "macs_before": original.macs if original else 0,
                "macs_after": cost.macs,
                "bytes_before": original.bytes if original else 0,
                "bytes_after": cost.bytes,
                "channels_before": original_channels.get(cost.name, 0),
                "channels_after": round(channels.get(cost.name, 0) * (1 - sparsity)),
                "group": group.name if group else None,
                "sparsity": sparsity,
                "bits": cost.bits,
                "rank": cost.rank,
            }
        )
    return table
