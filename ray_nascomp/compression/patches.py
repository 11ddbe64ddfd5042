"""What convolutions read: the patches of their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def parts_and_width(layer: nn.Module) -> tuple[int, int]:
    """Groups of a layer, and the features that each of its output channels reads.

    Args:
        layer: A linear layer or a convolution.
    """
    if isinstance(layer, CONVOLUTIONS):
        return layer.groups, layer.weight[0].numel()
    assert isinstance(layer, nn.Linear)
    return 1, layer.in_features


def patch_window(layer: Convolution) -> str:
    """What patches depend on, beside the input."""
    window = layer.kernel_size, layer.stride, layer.padding, layer.padding_mode, layer.dilation, layer.groups
    return repr(window)


def sample_patches(
    layer: Convolution, inputs: Tensor, outputs: Sequence[int], count: int, generator: torch.Generator
) -> Tensor:
    """Patches at some places, the same ones in every sample.

    Args:
        layer: A convolution.
        inputs: Shape `(samples, channels, ...)`.
        outputs: Shape of what it makes of them: a convolution of a derived class may pad by itself, as
            much as this takes.
        count: Patches wanted, over all samples.
        generator: Of the choice of places.

    Returns:
        Shape `(patches, channels * kernel's places)`, a patch laid out as the weight is. The
        patches of one group of channels come before those of the next.
    """
    spans = [dilation * (size - 1) + 1 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    windows = list(zip(spans, layer.stride, strict=True))
    margins = list(layer._reversed_padding_repeated_twice)
    if type(layer) not in CONVOLUTIONS:
        missing = [
            max(0, (made - 1) * stride + span - read)
            for (span, stride), made, read in zip(windows, outputs[2:], inputs.shape[2:], strict=True)
        ]
        margins = [side for total in reversed(missing) for side in (total // 2, total - total // 2)]
    padded = pad(inputs, margins, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    windows_of = torch.arange(padded[0].numel()).view(padded.shape[1:])  # Where a sample's values lie in memory.
    for axis, (span, stride) in enumerate(windows, start=1):
        windows_of = windows_of.unfold(axis, span, stride)
    places = windows_of.shape[1 : 1 + len(windows)]
    chosen = torch.randperm(math.prod(places), generator=generator)[: math.ceil(count / len(inputs))]
    at_chosen: Any = (slice(None), *torch.unravel_index(chosen, places))
    without_gaps: Any = (..., *(slice(None, None, dilation) for dilation in layer.dilation))
    index = windows_of[at_chosen][without_gaps].transpose(0, 1).flatten(1)
    return padded.flatten(1).index_select(1, index.flatten()).view(-1, index.shape[1])
