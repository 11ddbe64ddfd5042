"""What sub-networks of a model are made of, without building them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray_nascomp.architecture.blocks import Block
from ray_nascomp.model_spec import GroupSpec, LayerSpec, ModelSpec

HEAD_KEYS = ("heads", "cross_heads")
"""Names of the dimensions of a block's attentions: its own, and the one to an encoder."""


@dataclass(frozen=True)
class ElasticSpecs:
    """Structures of sub-networks, from that of the whole model; holds no weights.

    Attributes:
        whole: The whole model's structure.
        blocks: Its blocks.
    """

    whole: ModelSpec
    blocks: tuple[Block, ...]

    def __call__(self, architecture: Mapping[str, Any]) -> ModelSpec:
        """The structure that tracing the architecture's network would find."""
        dropped = tuple(f"{name}." for name in dropped_blocks(architecture))
        return spec_without(self.whole, self._removed(architecture), dropped)

    def _removed(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Group name -> number of heads or neurons that are gone."""
        removed: dict[str, int] = {}
        for block in self.blocks:
            values = architecture.get(block.name, {})
            for key, attention in zip(HEAD_KEYS, block.attentions, strict=False):
                removed[attention.name] = attention.units - values.get(key, attention.units)
            if (feed_forward := block.feed_forward) is not None:
                group = self.whole.group_of(feed_forward.expand[0])
                if group is not None:
                    removed[group.name] = feed_forward.width - values.get("width", feed_forward.width)
        return removed


def spec_without(whole: ModelSpec, removed: Mapping[str, int], dropped: tuple[str, ...]) -> ModelSpec:
    """The structure that is left of a whole one.

    Args:
        whole: The whole model's structure.
        removed: Group -> number of its units that are gone.
        dropped: What the names of layers that are left out begin with.
    """
    groups = tuple(
        _group(group, removed.get(group.name, 0), dropped)
        for group in whole.groups
        if not all(layer.startswith(dropped) for layer in group.layers)
    )
    names = {group.name for group in groups}
    layers = tuple(_layer(layer, removed, names) for layer in whole.layers if not layer.name.startswith(dropped))
    return replace(whole, layers=layers, groups=groups)


def dropped_blocks(architecture: Mapping[str, Any]) -> set[str]:
    """Names of the blocks that an architecture leaves out."""
    return {name for name, values in architecture.items() if not values.get("keep", True)}


def _group(group: GroupSpec, removed: int, dropped: tuple[str, ...]) -> GroupSpec:
    layers = tuple(layer for layer in group.layers if not layer.startswith(dropped))
    width = group.width - removed
    return replace(
        group,
        width=width,
        layers=layers,
        prunable=group.prunable and width > 1,
        # Coupled attentions of left-out blocks took as many operations as the others.
        macs_per_unit=group.macs_per_unit * len(layers) // len(group.layers),
    )


def _layer(layer: LayerSpec, removed: Mapping[str, int], groups: set[str]) -> LayerSpec:
    shape = list(layer.weight_shape)
    gone = sum(removed.get(group, 0) * count for group, count in layer.in_groups)
    if layer.out_group is not None:
        shape[0] -= removed.get(layer.out_group, 0) * layer.out_per_unit
    if gone:
        shape[0 if layer.kind in ("batch_norm", "norm", "depthwise_conv") else 1] -= gone
    return replace(
        layer, weight_shape=tuple(shape), in_groups=tuple(pair for pair in layer.in_groups if pair[0] in groups)
    )
