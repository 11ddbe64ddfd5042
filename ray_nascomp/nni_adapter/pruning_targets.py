"""What NNI's pruners are pointed at for a group, and how their masks are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import GroupSpec, ModelSpec
from ray_nascomp.pruners import norms_of

Masks = Mapping[str, Mapping[str, Tensor]]
"""NNI's masks: layer name -> name of its parameter -> mask."""

GroupCounts = Mapping[str, tuple[GroupSpec, int]]
"""Group name -> the group and the number of its units to remove."""


def decisive_layers(group: GroupSpec, method: str, spec: ModelSpec) -> tuple[str, ...]:
    """Names of the layers whose weights decide: normalisations for slim, the output projection for heads."""
    if group.columns_of is not None:
        return (group.columns_of,)
    norms = norms_of(spec, group.name) if method == "slim" else ()
    return norms or group.layers


def group_entries(model: nn.Module, group: GroupSpec, count: int, method: str, spec: ModelSpec) -> list[dict[str, Any]]:
    """NNI's config for a group, one entry a layer: their order, unlike that of names in one entry, is fixed.

    Args:
        model: The model.
        group: The group.
        count: Number of its units to remove, at least 1.
        method: A method of `CHANNEL_METHODS`.
        spec: The model's structure.
    """
    entry = {
        # NNI removes floor(ratio * width): half a unit more makes the count exact.
        "sparse_ratio": (count + 0.5) / group.width,
        "dependency_group_id": group.name,
        "target_names": ["weight"],
    }
    entries = []
    for name in decisive_layers(group, method, spec):
        weight: Any = model.get_submodule(name).weight
        if group.columns_of is not None:
            entry["granularity"] = [weight.shape[0], weight.shape[1] // group.width]
        elif weight.shape[0] != group.width:
            entry["granularity"] = [weight.shape[0] // group.width, *weight.shape[1:]]
        entries.append({"op_names": [name], **entry})
    return entries


def follower_entries(group: GroupSpec, method: str, spec: ModelSpec) -> list[dict[str, Any]]:
    """NNI's config for what has to vanish with a group's channels while the network trains.

    A masked channel still emits its bias and its normalisation's shift; the network would learn to
    use them, and lose them when the channel is removed.
    """
    if group.columns_of is not None:
        return []  # Nothing reads a masked column.
    decisive = decisive_layers(group, method, spec)
    followers = [name for name in (*group.layers, *norms_of(spec, group.name)) if name not in decisive]
    align = {"module_name": decisive[0], "target_name": "weight", "dims": [0]}
    return [
        {"op_names": [name], "target_names": names, "target_settings": {target: {"align": align} for target in names}}
        for name, names in [(name, ["bias"]) for name in decisive] + [(name, ["weight", "bias"]) for name in followers]
    ]


def heads_by_rows(groups: GroupCounts, method: str, spec: ModelSpec) -> GroupCounts:
    """The groups, heads chosen by the rows of their queries, keys and values where NNI cannot use the columns.

    It keeps one mask a weight: the columns of an output projection whose rows are channels of
    another group cannot have theirs in the same run.

    Raises:
        ConfigError: For such heads where one layer makes queries, keys and values.
    """
    taken = {
        layer for group, _ in groups.values() if not group.is_heads for layer in decisive_layers(group, method, spec)
    }
    resolved = {}
    for name, (group, count) in groups.items():
        if group.columns_of in taken:
            if len(group.layers) % 3:
                raise ConfigError(
                    f"prune.schedule: heads of {name!r} are chosen by the columns of {group.columns_of!r}, whose rows "
                    "are channels of another pruned group. Leave one of the two whole, or use no schedule"
                )
            group = replace(group, columns_of=None)
        resolved[name] = (group, count)
    return resolved


def read_removed(masks: Masks, groups: GroupCounts, method: str, spec: ModelSpec) -> dict[str, list[int]]:
    """The units that NNI's masks remove.

    Returns:
        Group name -> ascending indices of units.

    Raises:
        RuntimeError: If NNI has removed another number of units than it was asked for.
    """
    removed = {}
    for name, (group, count) in groups.items():
        mask = masks[decisive_layers(group, method, spec)[0]]["weight"]
        if group.columns_of is not None:
            alive = mask.any(dim=0).reshape(group.width, -1).any(dim=1)
        else:
            alive = mask.reshape(group.width, -1).any(dim=1)
        dead = (~alive).nonzero().flatten().tolist()
        if len(dead) != count:
            raise RuntimeError(f"NNI's {method} removed {len(dead)} units of group {name!r}; {count} were asked for")
        removed[name] = dead
    return removed
