"""Which axes of a model's inputs may change their length: the batch, and where the model allows it the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.tasks.calling import call, map_tensors, tensors_of

Axes = tuple[dict[int, str], ...]
"""For each input tensor, in their order, the names of its axes of free length by position."""

_SEQUENCE_LAYERS = (nn.RNNBase, nn.Conv1d, nn.MultiheadAttention)


def batch_axes(inputs: Any) -> Axes:
    """The first axis of each input tensor."""
    return tuple({0: "batch"} for _ in tensors_of(inputs))


def sequence_axes(model: nn.Module, inputs: Any) -> Axes | None:
    """The batch and the sequence axes, if there are any that the model takes in another length.

    Token ids and masks are sequences along their second axis. Of floating-point inputs with up to
    three axes, those along which a model with recurrent layers, attention or one-dimensional
    convolutions still runs are.

    Args:
        model: The model in evaluation mode.
        inputs: Inputs that it runs on.
    """
    tensors = tensors_of(inputs)
    integer_lengths = {
        tensor.shape[1] for tensor in tensors.values() if tensor.ndim == 2 and not tensor.is_floating_point()
    }
    together: dict[tuple[int, int, bool], list[int]] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        for axis in _candidates(tensor, integer_lengths, model):
            # Source and target of a translation may be of one length in the example.
            together.setdefault((axis, tensor.shape[axis], "decoder" in name), []).append(index)
    axes = batch_axes(inputs)
    found = 0
    for (axis, _length, _is_decoder), indices in together.items():
        name = f"length_{found}" if found else "length"
        trial = tuple({0: "batch", axis: name} if index in indices else {0: "batch"} for index in range(len(axes)))
        if _runs(model, resized(inputs, trial)):
            found += 1
            for index in indices:
                axes[index][axis] = name
    return axes if found else None


def resized(inputs: Any, axes: Axes) -> Any:
    """The inputs with every axis but the batch at another length: three quarters, or one more if it is short."""
    lengths = iter(axes)

    def resize(tensor: Tensor) -> Tensor:
        for axis in next(lengths):
            if axis:
                tensor = _resize(tensor, axis, from_end)
        return tensor

    from_end = _starts_with_padding(inputs, axes)
    return map_tensors(inputs, resize)


def _candidates(tensor: Tensor, integer_lengths: set[int], model: nn.Module) -> list[int]:
    if integer_lengths:
        return [1] if tensor.ndim == 2 and tensor.shape[1] in integer_lengths and tensor.shape[1] > 1 else []
    if tensor.ndim > 3 or not any(is_sequence_layer(module) for module in model.modules()):
        return []
    return [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] > 1]


def is_sequence_layer(module: nn.Module) -> bool:
    """Whether a module works along a sequence."""
    return isinstance(module, _SEQUENCE_LAYERS) or "attention" in type(module).__name__.lower()


def _runs(model: nn.Module, inputs: Any) -> bool:
    try:
        with torch.no_grad():
            return bool(torch.isfinite(call(model, inputs)).all())
    except Exception:  # Whatever a model raises for a length that it does not take.
        return False


def _resize(tensor: Tensor, axis: int, from_end: bool) -> Tensor:
    length = tensor.shape[axis]
    if length < 4:
        return torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
    kept = 3 * length // 4
    return tensor.narrow(axis, length - kept if from_end else 0, kept)


def _starts_with_padding(inputs: Any, axes: Axes) -> bool:
    """Whether a sample's mask leaves nothing in the part that `_resize` keeps."""
    for (name, tensor), own in zip(tensors_of(inputs).items(), axes, strict=True):
        if "mask" in name and tensor.ndim == 2 and 1 in own and not _resize(tensor, 1, False).bool().any(1).all():
            return True
    return False
