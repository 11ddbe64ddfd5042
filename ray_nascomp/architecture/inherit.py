"""Weights for a network of another architecture, sliced from a trained one.

The slices are those of once-for-all networks (Cai et al. 2020, arXiv 1908.09791): leading
channels, and the centre of larger kernels. The gates of a recurrent layer are sliced one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def inherit_weights(network: nn.Module, parent: nn.Module) -> list[str]:
    """Copies into a network what a parent has under the same names.

    Where shapes differ, the overlap is copied: leading entries of channel dimensions, the
    centre of kernel dimensions, and of a recurrent layer the leading entries of each gate. What
    has no counterpart keeps its initial value; an LSTM and a GRU are none of each other.

    Args:
        network: The network to fill, in place.
        parent: The trained model.

    Returns:
        Names of parameters and buffers that had no counterpart.
    """
    theirs = parent.state_dict()
    gates, their_gates = _gates(network), _gates(parent)
    missing = []
    with torch.no_grad():
        for name, mine in network.state_dict().items():
            other = theirs.get(name)
            if other is None or other.dim() != mine.dim() or gates.get(name) != their_gates.get(name):
                missing.append(name)
            elif name in gates:
                for part, source in zip(mine.chunk(gates[name]), other.chunk(gates[name]), strict=True):
                    _copy_overlap(part, source)
            else:
                _copy_overlap(mine, other)
    return missing


def _gates(network: nn.Module) -> dict[str, int]:
    """Name of each parameter of recurrent layers that has the rows of several gates -> their number."""
    counts = {"LSTM": 4, "GRU": 3}
    return {
        f"{name}.{parameter}" if name else parameter: counts[layer.mode]
        for name, layer in network.named_modules()
        if isinstance(layer, nn.RNNBase) and layer.mode in counts
        for parameter, _ in layer.named_parameters()
        if not parameter.startswith("weight_hr")  # A projection has no gates.
    }


def _copy_overlap(mine: Tensor, other: Tensor) -> None:
    to, source = [], []
    for dim, (size, available) in enumerate(zip(mine.shape, other.shape, strict=True)):
        shared = min(size, available)
        offset_to, offset_source = ((size - shared) // 2, (available - shared) // 2) if dim >= 2 else (0, 0)
        to.append(slice(offset_to, offset_to + shared))
        source.append(slice(offset_source, offset_source + shared))
    mine[tuple(to)] = other[tuple(source)].to(mine)
