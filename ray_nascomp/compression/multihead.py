"""`nn.MultiheadAttention` with a linear layer for each projection.

Torch's module keeps queries, keys and values in one bare parameter and insists on heads that fill
the model's width: its heads cannot be removed, its projections neither factorised nor quantized.
The module here computes the same from four plain layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class SplitAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762), called as `nn.MultiheadAttention` is.

    A mask for each head may be given for the heads that there were: those of removed heads are left out.

    Args:
        original: The module whose weights it takes; without `add_bias_kv` and `add_zero_attn`.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = self._heads_given = original.num_heads
        self.kept_heads = tuple(range(original.num_heads))
        self.head_dim = original.head_dim
        self.batch_first = original.batch_first
        self.dropout = original.dropout
        if original._qkv_same_embed_dim:
            weights = original.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(
                weight.detach() for weight in (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
            )
        bias = original.in_proj_bias
        biases = bias.detach().chunk(3) if bias is not None else (None, None, None)
        requires_grad = original.out_proj.weight.requires_grad
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias, requires_grad) for weight, bias in zip(weights, biases, strict=True)
        )
        output = original.out_proj
        self.out_proj = _linear(output.weight.detach(), output.bias, requires_grad)
        self.train(original.training)

    # What layers of torch ask before they take a fused path around the module.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    @property
    def embed_dim(self) -> int:
        """Features of its outputs."""
        return int(self.out_proj.weight.shape[0])

    def keep_heads(self, kept: Sequence[int]) -> None:
        """Notes which of the heads are left, so that their masks are told from those of the others."""
        self.kept_heads = tuple(self.kept_heads[head] for head in kept)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`.

        Raises:
            ValueError: For `is_causal` without its mask, and masks for another number of heads.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint: attn_mask has to be given with it")
        is_batch = query.dim() == 3
        inputs = [tensor if is_batch else tensor.unsqueeze(0) for tensor in (query, key, value)]
        if is_batch and not self.batch_first:
            inputs = [tensor.transpose(0, 1) for tensor in inputs]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        heads = [
            layer(tensor).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer, tensor in zip(layers, inputs, strict=True)
        ]
        mask = self._mask(key_padding_mask, attn_mask, heads[0])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(self.head_dim)
            shares = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = shares @ heads[2]
            weights = shares.mean(1) if average_attn_weights else shares
            weights = weights if is_batch else weights.squeeze(0)
        else:
            mixed = functional.scaled_dot_product_attention(
                heads[0], heads[1], heads[2], attn_mask=mask, dropout_p=dropout
            )
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not is_batch:
            return output.squeeze(0), weights
        return output if self.batch_first else output.transpose(0, 1), weights

    def _mask(self, padding: Tensor | None, attention: Tensor | None, heads: Tensor) -> Tensor | None:
        """What is added to the scores, of a shape that spreads to `(batch, heads, queries, keys)`."""
        parts = []
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
            parts.append(_additive(padding, heads)[:, None, None, :])
        if attention is not None:
            if attention.dim() == 3:
                attention = self._mask_of_each_head(attention, heads.shape[0])
            parts.append(_additive(attention, heads))
        return sum(parts[1:], parts[0]) if parts else None

    def _mask_of_each_head(self, mask: Tensor, samples: int) -> Tensor:
        """A mask of shape `(samples * heads, ...)` as one of shape `(samples, heads that are left, ...)`."""
        # A caller who asks how many heads there are knows of those alone that are left.
        if mask.shape[0] == samples * self.num_heads:
            return mask.reshape(samples, self.num_heads, *mask.shape[1:])
        if mask.shape[0] == samples * self._heads_given:
            whole = mask.reshape(samples, self._heads_given, *mask.shape[1:])
            return whole[:, list(self.kept_heads)]
        raise ValueError(
            f"attn_mask of shape {tuple(mask.shape)} for {samples} samples: there are {self._heads_given} heads, of "
            f"which {self.num_heads} are left; a mask for each of these, or one for all, is allowed"
        )


def split_attentions(model: nn.Module) -> None:
    """Replaces every `nn.MultiheadAttention` by a `SplitAttention` that computes the same, in place.

    Those with `add_bias_kv` or `add_zero_attn`, and subclasses, are left as they are.
    """
    made: dict[nn.Module, SplitAttention] = {}
    for parent in list(model.modules()):
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention and child.bias_k is None and not child.add_zero_attn:
                if child not in made:
                    made[child] = SplitAttention(child)
                setattr(parent, name, made[child])


def _linear(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=requires_grad)
    return layer


def _additive(mask: Tensor, like: Any) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)
    return mask.to(like)
