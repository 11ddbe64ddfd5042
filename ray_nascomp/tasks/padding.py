"""Padding of token sequences: how long samples are, and batches without the columns that are padding alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.tasks.calling import call, device_of, map_tensors, tensors_of
from ray_nascomp.tasks.data import Data

_LEAST = 2
"""Fewest columns that are kept: exported files take no axis of length 1 for a free one."""
_TOLERANCE = 1e-4
_CHUNK = 50
"""So many batches' samples are sorted together."""


def sequence_lengths(inputs: Any) -> Tensor | None:
    """Position behind the last token of each sample, shape `(samples,)`.

    Args:
        inputs: A batch's inputs.

    Returns:
        None unless the inputs are a dict of integer tensors of one shape `(samples, length)`, an
        `attention_mask` among them.
    """
    if not isinstance(inputs, Mapping) or "attention_mask" not in inputs:
        return None
    mask = inputs["attention_mask"]
    for tensor in inputs.values():
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.ndim != 2:
            return None
        if tensor.shape != mask.shape:
            return None
    return (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def without_padding(inputs: Any) -> Any:
    """The inputs without the last columns that no sample's mask keeps; as they are where there is no such mask."""
    lengths = sequence_lengths(inputs)
    if lengths is None:
        return inputs
    kept = max(_LEAST, int(lengths.max()))
    return map_tensors(inputs, lambda tensor: tensor[:, :kept])


def ignores_padding(model: nn.Module, data: Data) -> bool:
    """Whether a model gives the shortest of the samples the same outputs, of the same shape, without its padding.

    Args:
        model: The model in evaluation mode.
        data: Samples. Where they are read from a dataset, or none of them is padded, the answer is no.
    """
    if not data.is_fixed:
        return False
    padded = data.take(order_by_length(data)[:1])[0]
    cut = without_padding(padded)
    device = device_of(model)
    shapes = [{name: tensor.shape for name, tensor in tensors_of(inputs).items()} for inputs in (padded, cut)]
    if shapes[0] == shapes[1]:
        return False
    with torch.no_grad():
        expected, found = (
            call(model, map_tensors(inputs, lambda tensor: tensor.to(device))) for inputs in (padded, cut)
        )
    tolerance = _TOLERANCE * max(1.0, float(expected.abs().max()))
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=0, atol=tolerance)


def order_by_length(data: Data, indices: Tensor | None = None) -> Tensor:
    """Indices of samples, the shortest first; in the order in which they are where they have no length.

    Args:
        data: The samples.
        indices: Which of them; all if absent.
    """
    chosen = torch.arange(len(data)) if indices is None else indices
    # One sample tells: images are not to be copied for it.
    if not data.is_fixed or sequence_lengths(data.take(chosen[:1])[0]) is None:
        return chosen
    lengths = sequence_lengths(data.take(chosen)[0])
    assert lengths is not None
    return chosen[lengths.argsort(stable=True)]


def batches_of_similar_length(data: Data, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of one epoch's batches, shuffled, samples of similar length together: less of a batch is padding.

    As `group_by_length` of transformers: shuffled samples are sorted by length fifty batches at a time.

    Args:
        data: The samples; those without a length come in batches that are merely shuffled.
        batch_size: Samples in a batch; one may have fewer.
        generator: What shuffles.
    """
    order = torch.randperm(len(data), generator=generator)
    chunks = order.split(_CHUNK * batch_size)
    batches = [batch for chunk in chunks for batch in order_by_length(data, chunk).split(batch_size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator)]
