"""How a model is called on a batch's inputs, and what counts as its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call(model: Any, inputs: Any) -> Tensor:
    """The model's output tensor for inputs given as a tensor, a tuple or a dict.

    Of an output object with `logits` these are taken, of one with logits for a span's start and
    end both, stacked in a last dimension of 2, of a dict "logits" or its first value, of a tuple
    the first element.
    """
    # torch's fused attention in evaluation mode goes past the layers, and so past what wraps them.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            output = model(*inputs)
        else:
            output = model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return main_output(output)


def main_output(output: Any) -> Tensor:
    """The tensor that a model's output stands for (see `call`)."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    first = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return main_output(first)


def tensors_of(inputs: Any) -> dict[str, Tensor]:
    """The input tensors by name; positional ones are called input_0, input_1, ..."""
    if isinstance(inputs, Mapping):
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    values = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    return {f"input_{i}": value for i, value in enumerate(values) if isinstance(value, Tensor)}


def batch_size_of(inputs: Any) -> int:
    """Number of samples in a batch's inputs."""
    return next(iter(tensors_of(inputs).values())).shape[0]


def map_tensors(inputs: Any, function: Any) -> Any:
    """The inputs with every tensor replaced by the function's value."""
    if isinstance(inputs, Mapping):
        return {name: map_tensors(value, function) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(map_tensors(value, function) for value in inputs)
    return function(inputs) if isinstance(inputs, Tensor) else inputs


class OutputTensor(nn.Module):
    """A model that returns its main output tensor alone, and takes positional tensors.

    Args:
        model: The model to wrap; it keeps its mode.
        names: Keyword names for the positional tensors; None where the model takes them as they are.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.train(model.training)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The main output."""
        if self.names is None:
            return main_output(self.model(*tensors))
        return main_output(self.model(**dict(zip(self.names, tensors, strict=True))))


def device_of(model: nn.Module) -> torch.device:
    """The device that the model's first parameter lies on; the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
