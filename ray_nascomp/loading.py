"""A saved compressed model as a torch module again: from JSON and safetensors, without pickle."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The compressed network that a run, or `results.best().export(folder)`, has saved.

    Its weights are in floating point: those that the integers of `model.onnx` were made from.

    Args:
        folder: A folder with manifest.json and model.safetensors.
        model: The original network, for its structure alone: any weights will do. Where the search
            chose an architecture, the network of that architecture (`build(architecture)`). A model
            of transformers need not be given, unless its architecture was searched.

    Returns:
        The network in evaluation mode, on the CPU.

    Raises:
        ConfigError: If the folder holds no saved run, or the network is not the one that was compressed.
    """
    from dataclasses import replace

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ray_nascomp.pipeline.candidate import rebuild_candidate
    from ray_nascomp.pipeline.checkpoint import WEIGHTS_FILE, nested, read_manifest
    from ray_nascomp.pipeline.prepare import rebuild_prepared
    from ray_nascomp.pipeline.snapshot import with_prefix
    from ray_nascomp.plan import CompressionPlan
    from ray_nascomp.tasks.base import Task

    manifest = read_manifest(Path(folder))
    if manifest["removed"] is None:
        raise ConfigError(f"{folder} holds the run of an infeasible plan; there is no network in it")
    try:
        tensors = load_file(Path(folder) / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{Path(folder) / WEIGHTS_FILE} cannot be read: {error}") from error
    network = copy.deepcopy(model) if model is not None else _from_transformers(manifest, folder)
    inputs = nested(with_prefix(tensors, "example."))
    samples = (inputs, torch.zeros(2, dtype=torch.long))
    task = Task(network, samples, samples)
    removed = {name: [int(index) for index in indices] for name, indices in manifest["removed"].items()}
    plan = replace(CompressionPlan.from_config(manifest["config"], task.spec), architecture={})
    try:
        candidate = rebuild_candidate(task, plan, removed, manifest["ranks"])
        if manifest["is_prepared"]:
            rebuild_prepared(candidate, task, manifest["smoothed"])
        candidate.network.load_state_dict(with_prefix(tensors, "network."))
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"the network is not the one whose compressed form {folder} holds: {error}") from error
    return candidate.network.eval()


def _from_transformers(manifest: Mapping[str, Any], folder: str | Path) -> nn.Module:
    """The model of transformers that the manifest describes, with random weights."""
    described = manifest.get("transformers")
    if described is None:
        raise ConfigError(f"model: none was given; {folder} needs the original network, with any weights")
    if manifest["config"].get("architecture"):
        raise ConfigError(f"model: none was given; {folder} needs the network of the architecture that was searched")
    import transformers

    found = getattr(transformers, described["class"], None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ConfigError(f"{folder}: {described['class']!r} is no model of transformers {transformers.__version__}")
    config_class: Any = found.config_class
    network: nn.Module = found(config_class.from_dict(described["config"]))
    return network
