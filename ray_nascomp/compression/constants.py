"""Layers whose inputs do not depend on the model's: of tables of positions, say. Exporters compute them once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.compression.patches import CONVOLUTIONS
from ray_nascomp.tasks.axes import resized, sequence_axes
from ray_nascomp.tasks.calling import call, map_tensors


def layers_of_constants(model: nn.Module, example_inputs: Any) -> frozenset[str]:
    """Names of linear layers and convolutions that give as much however many samples there are, and however long.

    Args:
        model: The model in evaluation mode.
        example_inputs: Inputs that it runs on, batch first.

    Returns:
        None of them where the model does not run on another number of samples, or on other lengths at once.
    """
    shapes = _shapes(model, example_inputs)
    try:
        others = _shapes(model, map_tensors(example_inputs, lambda tensor: torch.cat([tensor, tensor])))
        constant = {name for name, own in shapes.items() if others.get(name) == own}
        if constant and (axes := sequence_axes(model, example_inputs)) is not None:
            others = _shapes(model, resized(example_inputs, axes))
            constant = {name for name in constant if others.get(name) == shapes[name]}
    except Exception:  # Whatever a model raises for a batch or lengths that it does not take.
        return frozenset()
    return frozenset(constant)


def _shapes(model: nn.Module, inputs: Any) -> dict[str, list[torch.Size]]:
    """Shapes of what each such layer gives, call by call."""
    shapes: dict[str, list[torch.Size]] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.numel():
            shapes.setdefault(name, []).append(output.shape)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS))
    ]
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
