"""Convolutions that multiply by what they make of their weight, such as standardised ones (arXiv 1903.10520)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ray_nascomp.compression.patches import CONVOLUTIONS
from ray_nascomp.tasks.calling import call

_CONVOLVE = (torch.conv1d, torch.conv2d, torch.conv3d)


def convolutions_making_weights(model: nn.Module, example_inputs: Any) -> set[str]:
    """Names of the convolutions of a library's own class that make what they multiply by of their weight.

    Args:
        model: The model; run once if it has convolutions of such a class.
        example_inputs: Inputs to run it on.
    """
    derived = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CONVOLUTIONS) and type(module) not in CONVOLUTIONS
    }
    if not derived:
        return set()
    with torch.no_grad(), _WeightsSeen() as seen:
        call(model, example_inputs)
    # A parametrized weight is another tensor at each look; those that were seen are kept, so that none has its id.
    return {name for name, module in derived.items() if id(module.weight) not in seen.weights}


class _WeightsSeen(TorchFunctionMode):
    """Remembers the weights of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if function in _CONVOLVE:
            weight = args[1] if len(args) > 1 else keywords["weight"]
            self.weights[id(weight)] = weight
        return function(*args, **keywords)
