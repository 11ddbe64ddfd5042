"""Embeddings in few bits, simulated: NNI has no quantizer for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_TINY = torch.finfo(torch.float32).eps


class RoundedEmbeddings:
    """Embeddings whose rows are rounded to integers as they are looked up, until `close`.

    Rows are symmetric, one scale each: its largest magnitude over `2^(bits-1) - 1`. Gradients go
    straight through (Bengio et al. 2013, arXiv 1308.3432), so that training reaches the rows.

    Args:
        model: The model.
        bits: Names of embeddings -> bits, 2..8.
    """

    def __init__(self, model: nn.Module, bits: Mapping[str, int]) -> None:
        self._model = model
        self._limits = {name: 2 ** (value - 1) - 1 for name, value in bits.items()}
        self._handles = [
            model.get_submodule(name).register_forward_hook(_rounding(limit)) for name, limit in self._limits.items()
        ]

    def scales(self) -> dict[str, np.ndarray]:
        """Name -> scales of the rows, shape `(rows,)`."""
        found = {}
        for name, limit in self._limits.items():
            weight: Any = self._model.get_submodule(name).weight
            found[name] = _row_scales(weight.detach(), limit).flatten().cpu().numpy()
        return found

    def close(self) -> None:
        """Embeddings are looked up as they are again."""
        for handle in self._handles:
            handle.remove()


def _rounding(limit: int) -> Any:
    def hook(_module: nn.Module, _inputs: Any, rows: Tensor) -> Tensor:
        scale = _row_scales(rows.detach(), limit)
        rounded = (rows.detach() / scale).round() * scale
        return rows + (rounded - rows.detach())

    return hook


def _row_scales(rows: Tensor, limit: int) -> Tensor:
    return (rows.abs().amax(dim=-1, keepdim=True) / limit).clamp(min=_TINY)
