"""Joint search of a network's architecture and its compression, for Ray Tune.

Names are imported when they are first used, so that `import ray_nascomp` costs no more than
Ray Tune itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_nascomp.architecture.supernet import train_supernet
    from ray_nascomp.builders import compression_space
    from ray_nascomp.compression.sensitivity import measure_sensitivity
    from ray_nascomp.costs import CostModel
    from ray_nascomp.errors import ConfigError, InfeasibleError
    from ray_nascomp.goals import Constraint, Goal, Objective
    from ray_nascomp.loading import load
    from ray_nascomp.model_spec import ModelSpec
    from ray_nascomp.observations import Observation
    from ray_nascomp.pipeline import compress, compress_steps
    from ray_nascomp.plan import CompressionPlan
    from ray_nascomp.recorded import recorded
    from ray_nascomp.registry import Pruner, Quantizer, Stage, register
    from ray_nascomp.restoring import restore
    from ray_nascomp.results import Results
    from ray_nascomp.space import bits, rank, sparsity, when
    from ray_nascomp.tasks import Task
    from ray_nascomp.tasks.huggingface import HuggingFaceTask
    from ray_nascomp.time_limit import time_limited
    from ray_nascomp.trial import compression_trainable

__version__ = "0.1.0"

_EXPORTS = {
    "CompressionPlan": "plan",
    "ConfigError": "errors",
    "Constraint": "goals",
    "CostModel": "costs",
    "Goal": "goals",
    "HuggingFaceTask": "tasks.huggingface",
    "InfeasibleError": "errors",
    "ModelSpec": "model_spec",
    "Objective": "goals",
    "Observation": "observations",
    "Pruner": "registry",
    "Quantizer": "registry",
    "Results": "results",
    "Stage": "registry",
    "Task": "tasks",
    "bits": "space",
    "compress": "pipeline",
    "compress_steps": "pipeline",
    "compression_space": "builders",
    "compression_trainable": "trial",
    "load": "loading",
    "measure_sensitivity": "compression.sensitivity",
    "rank": "space",
    "recorded": "recorded",
    "register": "registry",
    "restore": "restoring",
    "sparsity": "space",
    "time_limited": "time_limit",
    "train_supernet": "architecture.supernet",
    "when": "space",
}

__all__ = [
    "CompressionPlan",
    "ConfigError",
    "Constraint",
    "CostModel",
    "Goal",
    "HuggingFaceTask",
    "InfeasibleError",
    "ModelSpec",
    "Objective",
    "Observation",
    "Pruner",
    "Quantizer",
    "Results",
    "Stage",
    "Task",
    "bits",
    "compress",
    "compress_steps",
    "compression_space",
    "compression_trainable",
    "load",
    "measure_sensitivity",
    "rank",
    "recorded",
    "register",
    "restore",
    "sparsity",
    "time_limited",
    "train_supernet",
    "when",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
