"""The pruners and what each can be used for. Free of torch, so that plans are checked without it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    from ray_nascomp.model_spec import GroupSpec, LayerSpec, ModelSpec

CHANNEL_METHODS = ("l1_norm", "l2_norm", "fpgm", "taylor", "slim", "movement")
"""Methods that remove whole channels or heads."""

WEIGHT_METHODS = ("level", "movement_level", "2:4")
"""Methods that zero single weights."""

SCHEDULES = ("linear", "agp")
"""How sparsity grows while the network trains: evenly, or fast at first and ever slower (cubic)."""


def refusal(method: str, spec: ModelSpec, group: GroupSpec) -> str | None:
    """Why a method of `CHANNEL_METHODS` cannot prune a group, or None if it can.

    "slim" learns a factor a channel: on the batch normalisations that see this group alone, or,
    where there is none, on the rows of the layers that make the channels. Such a factor means
    nothing where a batch normalisation that spans several groups divides it out again.
    """
    if method != "slim" or group.is_heads or norms_of(spec, group.name):
        return None
    for layer in spec.layers:
        if layer.kind == "batch_norm" and any(name == group.name for name, _ in layer.in_groups):
            return (
                f"slim looks at a group's own batch normalisation, but {layer.name!r} spans the channels of "
                "several groups"
            )
    return None


def weight_refusal(method: str, layer: LayerSpec) -> str | None:
    """Why a method of `WEIGHT_METHODS` cannot prune a layer, or None if it can."""
    if method == "2:4" and (layer.kind != "linear" or layer.weight_shape[1] % 4):
        return "2:4 keeps two of every four inputs: it takes linear layers whose inputs are a multiple of 4"
    return None


def schedule_refusal(method: str, schedule: str) -> str | None:
    """Why a method cannot follow a schedule of `SCHEDULES`, or None if it can."""
    if method in ("movement", "movement_level") and schedule != "agp":
        return "movement pruning has a schedule of its own, which grows as 'agp' does"
    if method == "2:4":
        return "2:4 has one sparsity, which cannot grow"
    return None


def norms_of(spec: ModelSpec, group: str) -> tuple[str, ...]:
    """Names of the batch normalisations whose channels are exactly those of a group."""
    return tuple(layer.name for layer in spec.layers if layer.kind == "batch_norm" and layer.in_groups == ((group, 1),))


def check_method(method: str, allowed: Iterable[str]) -> None:
    """Raises a ConfigError where a method is not one of those allowed."""
    if method not in allowed:
        raise ConfigError.unknown("prune.method", method, allowed)
