"""From a task to a search space: a plain dict of Tune domains, to delete from, fix or add to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ray import tune

from ray_nascomp import registry
from ray_nascomp.errors import ConfigError
from ray_nascomp.plan import bits_of, quantize_methods
from ray_nascomp.space import Role, Space, rank, sparsity
from ray_nascomp.tasks.base import Task

_PRUNERS = ("l1_norm", "l2_norm", "fpgm", "taylor")
_QUANTIZERS = ("ptq", "qat")


def compression_space(
    task: Task,
    *,
    sparsities: Literal["group", "uniform"] = "group",
    ranks: Literal["layer", "uniform", "none"] = "none",
    bits: Literal["layer", "uniform"] = "uniform",
    bit_choices: Sequence[int] = (8, 32),
    max_sparsity: float = 0.9,
) -> dict[str, Any]:
    """The dimensions of a joint search on a task.

    Args:
        task: The task; with a builder, its architecture is searched as well.
        sparsities: One sparsity for each group of coupled layers, or one for all.
        ranks: One rank for each layer that can be factorised, one for all, or no low rank.
        bits: One choice of bits for each layer, or one for all.
        bit_choices: Bits to choose from; methods that do not offer all of them are left out.
        max_sparsity: Largest sparsity, a multiple of 0.05 below 1.

    Returns:
        A nested dict with the stages "architecture" (if there is a builder), "prune", "low_rank",
        "finetune" and "quantize", and those of users' own stages.

    Raises:
        ConfigError: If an argument is not allowed.
        UntraceableModelError: If the task's model does not run on its own inputs.
    """
    for name, value, allowed in (
        ("sparsities", sparsities, ("group", "uniform")),
        ("ranks", ranks, ("layer", "uniform", "none")),
        ("bits", bits, ("layer", "uniform")),
    ):
        if value not in allowed:
            raise ConfigError.unknown(name, value, allowed)
    groups, layers = list(task.spec.prunable_names), list(task.spec.quantizable_names)
    space: dict[str, Any] = {}
    if task.architecture:
        space["architecture"] = dict(task.architecture)
    for name, stage in registry.registered("stage").items():
        if dimensions := stage().dimensions(task.spec):
            space[name] = dimensions
    if groups:
        per_group = {name: sparsity(upper=max_sparsity) for name in groups}
        space["prune"] = {
            "method": tune.choice([*_PRUNERS, *registry.registered("pruner")]),
            "sparsity": per_group if sparsities == "group" else sparsity(upper=max_sparsity),
            "round_to": 8,
        }
    if ranks != "none" and task.spec.factorisable_names:
        per_layer = {name: rank(0.1, 1.0) for name in task.spec.factorisable_names}
        space["low_rank"] = {"rank": per_layer if ranks == "layer" else rank(0.1, 1.0), "round_to": 8}
    space["finetune"] = {
        "lr": tune.loguniform(*task.learning_rates),
        "distill": {"weight": tune.choice([0.0, 0.3, 0.6, 0.9]), "temperature": tune.choice([1.0, 2.0, 4.0])},
    }
    if layers:
        choices = sorted(bit_choices)
        domain = tune.choice(choices)
        space["quantize"] = {
            "method": tune.choice(_quantizers(choices)),
            "bits": domain if bits == "uniform" else dict.fromkeys(layers, domain),
        }
    return space


def gentle_config(space: Mapping[str, Any]) -> dict[str, Any]:
    """A first point for a search: the whole network, with nothing but its numbers made smaller.

    Args:
        space: A space of `compression_space`, or one like it.

    Returns:
        A config of those keys that decide what is removed; searchers draw the others.
    """
    config: dict[str, Any] = {}
    for dimension in Space(space).dimensions:
        levels = dimension.levels or (dimension.lower, dimension.upper)
        if dimension.role is Role.SPARSITY:
            value = min(levels)
        elif dimension.role is Role.BITS:
            value = 8 if 8 in levels else max(levels)
        elif dimension.role in (Role.RANK, Role.ARCHITECTURE) and dimension.is_ordinal:
            value = max(levels)
        elif dimension.role is Role.ARCHITECTURE and set(levels) == {True, False}:
            value = True
        elif dimension.path == ("quantize", "method") and "ptq" in levels:
            value = "ptq"
        else:
            continue
        section = config
        for key in dimension.path[:-1]:
            section = section.setdefault(key, {})
        section[dimension.path[-1]] = value
    return config


def _quantizers(bits: Sequence[int]) -> list[str]:
    """The usual methods that offer all the bits, or any that does."""
    usual = (*_QUANTIZERS, *registry.registered("quantizer"))
    for methods in (usual, quantize_methods()):
        if found := [method for method in methods if set(bits) <= set(bits_of(method))]:
            return found
    offered = {method: bits_of(method) for method in quantize_methods()}
    raise ConfigError(f"bit_choices: {tuple(bits)} was given, no quantizer offers all of them; they offer {offered}")
