"""Shapes of the smaller layers that a low-rank layer is made of, from one rank and the original's shape.

Linear layers and embeddings become two matrices. A convolution becomes a Tucker-2 chain (Kim et
al. 2016, arXiv 1511.06530): a pointwise convolution into fewer channels, one with the original
kernel, a pointwise one out of them. Costs and ranks to search follow from here; no weights are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import LayerKind

FACTORISABLE_KINDS: tuple[LayerKind, ...] = ("linear", "embedding", "conv")
"""Kinds of layers that have a low-rank form; convolutions with groups have none."""


@dataclass(frozen=True)
class Factor:
    """One of the layers that a low-rank layer is made of.

    Attributes:
        kind: What the layer is.
        weight_shape: Shape of its `weight` as torch has it.
        bias: Whether it holds the original's bias.
        at_input: Whether it is applied at each position of the original's input rather than of its output;
            the two differ for a convolution with stride or without padding.
    """

    kind: LayerKind
    weight_shape: tuple[int, ...]
    bias: bool = False
    at_input: bool = False

    @property
    def params(self) -> int:
        """Parameters, with the bias."""
        return math.prod(self.weight_shape) + (self.weight_shape[0] if self.bias else 0)


def ranks_of_conv(rank: int, in_channels: int, out_channels: int) -> tuple[int, int]:
    """The pair of Tucker ranks that one rank stands for: both sides have that rank, or all their channels.

    Args:
        rank: 1 or more.
        in_channels: Input channels.
        out_channels: Output channels.

    Returns:
        Ranks of the input and the output channels. A stem with three input channels keeps all three.
    """
    return min(rank, in_channels), min(rank, out_channels)


def max_rank(weight_shape: Sequence[int], kind: LayerKind) -> int:
    """The full rank, at which the factors can represent any weight.

    Args:
        weight_shape: Shape of the original's `weight`.
        kind: One of `FACTORISABLE_KINDS`.

    Raises:
        ConfigError: For another kind.
    """
    if kind not in FACTORISABLE_KINDS:
        raise ConfigError.unknown("kind of a low-rank layer", kind, FACTORISABLE_KINDS)
    sides = weight_shape[0], weight_shape[1]
    return max(sides) if kind == "conv" and math.prod(weight_shape[2:]) > 1 else min(sides)


def factor_shapes(weight_shape: Sequence[int], kind: LayerKind, rank: int, bias: bool = False) -> tuple[Factor, ...]:
    """The layers that take the place of one, in the order in which they are applied.

    A side of a convolution that keeps all its channels gets no factor of its own. A pointwise
    convolution is a matrix: two factors, the first with its stride.

    Args:
        weight_shape: Shape of the original's `weight` as torch has it.
        kind: One of `FACTORISABLE_KINDS`.
        rank: From 1 to `max_rank`.
        bias: Whether the original has a bias; the last factor holds it.

    Raises:
        ConfigError: For a rank out of range or another kind.
    """
    full = max_rank(weight_shape, kind)
    if not 1 <= rank <= full:
        raise ConfigError(
            f"rank: {rank!r} was given for a weight of shape {tuple(weight_shape)}, 1 to {full} is allowed"
        )
    first, second, *kernel = weight_shape
    if kind == "embedding":
        return Factor("embedding", (first, rank)), Factor("linear", (second, rank), bias)
    if math.prod(kernel) == 1:
        ones = (1,) * len(kernel)
        return Factor(kind, (rank, second, *ones)), Factor(kind, (first, rank, *ones), bias)
    ones = (1,) * len(kernel)
    rank_in, rank_out = ranks_of_conv(rank, second, first)
    factors = [Factor("conv", (rank_out, rank_in, *kernel), bias and rank_out == first)]
    if rank_in < second:
        factors.insert(0, Factor("conv", (rank_in, second, *ones), at_input=True))
    if rank_out < first:
        factors.append(Factor("conv", (first, rank_out, *ones), bias))
    return tuple(factors)


def factor_params(weight_shape: Sequence[int], kind: LayerKind, rank: int, bias: bool = False) -> int:
    """Parameters of all factors together; arguments as for `factor_shapes`."""
    return sum(factor.params for factor in factor_shapes(weight_shape, kind, rank, bias))


def max_useful_rank(weight_shape: Sequence[int], kind: LayerKind) -> int:
    """The largest rank at which the factors have fewer parameters than the original; 0 if there is none."""
    return _max_useful_rank(tuple(weight_shape), kind)


@lru_cache(maxsize=4096)
def _max_useful_rank(weight_shape: tuple[int, ...], kind: LayerKind) -> int:
    original = math.prod(weight_shape)
    ranks = range(max_rank(weight_shape, kind), 0, -1)
    return next((rank for rank in ranks if factor_params(weight_shape, kind, rank) < original), 0)
