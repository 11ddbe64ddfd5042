"""Weights for a network of another architecture, sliced from a trained one.

The slices are those of once-for-all networks (Cai et al. 2020, arXiv 1908.09791): leading
channels, and the centre of larger kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def inherit_weights(network: nn.Module, parent: nn.Module) -> list[str]:
    """Copies into a network what a parent has under the same names.

    Where shapes differ, the overlap is copied: leading entries of channel dimensions, the
    centre of kernel dimensions. What has no counterpart keeps its initial value.

    Args:
        network: The network to fill, in place.
        parent: The trained model.

    Returns:
        Names of parameters and buffers that had no counterpart.
    """
    theirs = parent.state_dict()
    missing = []
    with torch.no_grad():
        for name, mine in network.state_dict().items():
            other = theirs.get(name)
            if other is None or other.dim() != mine.dim():
                missing.append(name)
            else:
                _copy_overlap(mine, other)
    return missing


def _copy_overlap(mine: Tensor, other: Tensor) -> None:
    to, source = [], []
    for dim, (size, available) in enumerate(zip(mine.shape, other.shape, strict=True)):
        shared = min(size, available)
        offset_to, offset_source = ((size - shared) // 2, (available - shared) // 2) if dim >= 2 else (0, 0)
        to.append(slice(offset_to, offset_to + shared))
        source.append(slice(offset_source, offset_source + shared))
    mine[tuple(to)] = other[tuple(source)].to(mine)
