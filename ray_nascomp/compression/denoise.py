"""Noise on a batch's inputs, for denoising distillation: the student sees it, the teacher does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TOKENS = "input_ids"


def noised(inputs: Any, noise: float) -> Any:
    """The inputs with noise from torch's generator.

    Real tensors get Gaussian noise. Of token numbers (`input_ids` of a dict, or an integer tensor
    that is the only input) some are replaced by tokens from other places of the batch, as far as
    an attention mask shows them. Other integer tensors stay as they are.

    Args:
        inputs: A tensor, a tuple or a dict of tensors.
        noise: Standard deviations of a tensor's values; share of tokens replaced; in [0, 1].
    """
    if isinstance(inputs, Mapping):
        mask = inputs.get("attention_mask")
        return {
            name: _noised(value, noise, mask if name == _TOKENS else None, replace=name == _TOKENS)
            for name, value in inputs.items()
        }
    if isinstance(inputs, (tuple, list)):
        return tuple(_noised(value, noise, None, replace=False) for value in inputs)
    return _noised(inputs, noise, None, replace=True)


def _noised(tensor: Any, noise: float, mask: Tensor | None, replace: bool) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    if tensor.is_floating_point():
        return tensor + noise * tensor.std(correction=0) * torch.randn_like(tensor)
    if not replace:
        return tensor
    shown = (
        mask.bool() if mask is not None and mask.shape == tensor.shape else torch.ones_like(tensor, dtype=torch.bool)
    )
    pool = tensor[shown]
    others = pool[torch.randint(len(pool), tensor.shape, device=tensor.device)]
    return torch.where(shown & (torch.rand(tensor.shape, device=tensor.device) < noise), others, tensor)
