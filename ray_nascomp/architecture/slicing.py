"""Channels taken out of a network whose groups are known, without tracing it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.compression.units import Places


def remove_units(
    model: nn.Module, places: Mapping[str, tuple[Places, ...]], removed: Mapping[str, Iterable[int]]
) -> None:
    """Removes units of groups, in place.

    Args:
        model: The model that the places were found in, or one of the same structure.
        places: Group -> where its units are.
        removed: Group -> units to remove.
    """
    gone: dict[tuple[str, bool], set[int]] = {}
    for group, units in removed.items():
        for place in places[group]:
            channels = gone.setdefault((place.layer, place.is_input), set())
            for unit in units:
                channels.update(place.channels[unit])
    for (name, is_input), channels in gone.items():
        if channels:
            _remove(model.get_submodule(name), channels, is_input)


def _remove(layer: Any, channels: set[int], is_input: bool) -> None:
    axis = 1 if is_input else 0
    kept = torch.tensor([i for i in range(layer.weight.shape[axis]) if i not in channels])
    for key, parameter in list(layer.named_parameters(recurse=False)):
        if not is_input or key == "weight":
            setattr(layer, key, nn.Parameter(_kept(parameter, kept, axis), requires_grad=parameter.requires_grad))
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.num_features = len(kept)
        for key, buffer in list(layer.named_buffers(recurse=False)):
            if buffer.dim() == 1:
                setattr(layer, key, _kept(buffer, kept, 0))
    elif isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = layer.weight.shape[1], layer.weight.shape[0]
    elif layer.groups > 1:  # Depthwise.
        layer.in_channels = layer.out_channels = layer.groups = len(kept)
    else:
        layer.in_channels, layer.out_channels = layer.weight.shape[1], layer.weight.shape[0]


def _kept(tensor: Tensor, kept: Tensor, axis: int) -> Tensor:
    return tensor.detach().index_select(axis, kept.to(tensor.device)).clone()
