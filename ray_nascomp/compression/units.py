"""Where the units of a group are, and whether that is true."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from ray_nascomp.compression.patches import CONVOLUTIONS
from ray_nascomp.tasks.calling import call

PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TOLERANCE = 1e-3
"""Share of the largest output by which rounding may change outputs when units are exchanged."""


@dataclass(frozen=True)
class Places:
    """Where the units of a group are in a layer.

    Attributes:
        layer: Name of the layer.
        is_input: Whether they are its input channels; otherwise its outputs, or what a normalisation passes on.
        channels: The layer's channels of each unit.
    """

    layer: str
    is_input: bool
    channels: tuple[tuple[int, ...], ...]


def is_depthwise(module: Any) -> bool:
    """Whether a module is a convolution of one channel a group."""
    return isinstance(module, CONVOLUTIONS) and module.groups > 1 and module.groups == module.out_channels


def places_in(
    members: Any, width: int, names: Mapping[nn.Module, str], graph: tp.DependencyGraph
) -> tuple[Places, ...] | None:
    """Everything that goes with the units of a group, if it is convolutions, linear layers and batch normalisations.

    Args:
        members: torch-pruning's group with all of its channels.
        width: Its units.
        names: Module -> name.
        graph: The graph that it comes from.
    """
    places = []
    for member in members:
        layer = member.dep.target.module
        if isinstance(layer, nn.Module) and next(layer.parameters(recurse=False), None) is None:
            continue
        if layer not in names or not isinstance(layer, (*PRODUCERS, nn.modules.batchnorm._BatchNorm)):
            return None
        channels: list[list[int]] = [[] for _ in range(width)]
        for channel, unit in zip(member.idxs, member.root_idxs, strict=True):
            channels[unit].append(int(channel))
        own = graph.get_pruner_of_module(layer)
        takes_inputs = isinstance(layer, PRODUCERS) and member.dep.handler == own.prune_in_channels
        is_input = takes_inputs and not is_depthwise(layer)
        places.append(Places(names[layer], is_input, tuple(map(tuple, channels))))
    return tuple(dict.fromkeys(places))


def are_exchangeable(model: nn.Module, example_inputs: Any, places: Iterable[tuple[Places, ...]]) -> bool:
    """Whether a model computes the same when the units of groups change places.

    If it does not, some place is not where these units go.

    Args:
        model: The model in evaluation mode; not changed.
        example_inputs: Inputs to run it with.
        places: The places of each group's units.
    """
    exchanged = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for group in places:
        order = torch.randperm(len(group[0].channels), generator=generator).tolist()
        for place in group:
            _exchange(exchanged.get_submodule(place.layer), place, order)
    outputs = []
    for network in (model, exchanged):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            outputs.append(call(network, example_inputs))
    expected, found = outputs
    most = _TOLERANCE * float(expected.abs().max())
    return bool(torch.allclose(found, expected, rtol=0, atol=most, equal_nan=True))


def _exchange(layer: nn.Module, place: Places, order: list[int]) -> None:
    width = len(place.channels)
    targets = torch.tensor([channel for unit in range(width) for channel in place.channels[unit]])
    sources = torch.tensor([channel for unit in order for channel in place.channels[unit]])
    axis = 1 if place.is_input else 0
    tensors = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    for key, tensor in tensors.items():
        if tensor.dim() > axis and (not place.is_input or key == "weight"):
            moved = tensor.detach().index_select(axis, sources.to(tensor.device))
            tensor.data.index_copy_(axis, targets.to(tensor.device), moved)
