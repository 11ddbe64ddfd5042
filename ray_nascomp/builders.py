"""From a task to a search space: a plain dict of Tune domains, to delete from, fix or add to."""

from __future__ import annotations

from typing import Any, Literal

from ray import tune

from ray_nascomp.errors import ConfigError
from ray_nascomp.plan import bits_of
from ray_nascomp.space import sparsity
from ray_nascomp.tasks.base import Task

_STRUCTURED = ("l1_norm", "l2_norm", "fpgm", "taylor")


def compression_space(
    task: Task,
    *,
    sparsities: Literal["group", "uniform"] = "group",
    bits: Literal["uniform", "layer"] = "uniform",
    max_sparsity: float = 0.9,
) -> dict[str, Any]:
    """The dimensions of a joint search on a task.

    Args:
        task: The task; with a builder, its architecture is searched as well.
        sparsities: One sparsity for each group of coupled layers, or one for all.
        bits: One choice of bits for all layers, or one for each.
        max_sparsity: Largest sparsity, a multiple of 0.05 below 1.

    Returns:
        A nested dict with the stages "architecture" (if there is a builder), "prune",
        "finetune" and "quantize".

    Raises:
        ConfigError: If an argument is not allowed.
        UntraceableModelError: If the task's model cannot be traced.
    """
    for name, value, allowed in (
        ("sparsities", sparsities, ("group", "uniform")),
        ("bits", bits, ("uniform", "layer")),
    ):
        if value not in allowed:
            raise ConfigError.unknown(name, value, allowed)
    groups = [group.name for group in task.spec.prunable_groups]
    layers = [layer.name for layer in task.spec.quantizable_layers]
    space: dict[str, Any] = {}
    if task.architecture:
        space["architecture"] = dict(task.architecture)
    if groups:
        per_group = {name: sparsity(upper=max_sparsity) for name in groups}
        space["prune"] = {
            "method": tune.choice(list(_STRUCTURED)),
            "sparsity": per_group if sparsities == "group" else sparsity(upper=max_sparsity),
            "round_to": 8,
        }
    space["finetune"] = {
        "lr": tune.loguniform(3e-4, 1e-2),
        "distill": {"weight": tune.choice([0.0, 0.3, 0.6, 0.9]), "temperature": tune.choice([1.0, 2.0, 4.0])},
    }
    if layers:
        choice = list(bits_of("ptq"))
        space["quantize"] = {
            "method": tune.choice(["ptq", "qat"]),
            "bits": tune.choice(choice) if bits == "uniform" else {name: tune.choice(choice) for name in layers},
        }
    return space
