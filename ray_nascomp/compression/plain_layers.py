"""Layers of which compression knows nothing, as plain ones that compute the same."""

from __future__ import annotations

from torch import nn

from ray_nascomp.compression.attention import replace_conv1d
from ray_nascomp.compression.multihead import split_attentions


def use_plain_layers(model: nn.Module) -> None:
    """Replaces GPT-2's `Conv1D` and torch's `nn.MultiheadAttention` by linear layers, in place."""
    replace_conv1d(model)
    split_attentions(model)
