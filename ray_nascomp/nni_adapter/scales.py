"""What integers mean: the scales that quantizers find and exported files hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WEIGHT_LIMIT = 63
"""Largest magnitude of an 8-bit weight whose products are computed in integers."""


@dataclass(frozen=True)
class ActivationScale:
    """Affine 8-bit quantization of a tensor: value = scale * (integer - zero_point), integer in 0..255."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class LayerScales:
    """What one layer's integers mean.

    Attributes:
        weight: Scales of the output channels, shape `(channels,)`; of an embedding one a row.
        input: The layer's input; None where only the weight is stored as integers and the layer
            computes in floating point.
        output: The layer's output, None where it is not quantized.
        bits: Bits of the weight, 1..8.
    """

    weight: np.ndarray
    input: ActivationScale | None
    output: ActivationScale | None
    bits: int = 8

    @property
    def limit(self) -> int:
        """Largest magnitude of the weight's integers.

        It is `2^(bits-1) - 1`, but for 8 bits with a quantized input `WEIGHT_LIMIT`, so that no
        product saturates, and for 1 bit 1, where the integers are -1 and +1 alone.
        """
        if self.bits == 8 and self.input is not None:
            return WEIGHT_LIMIT
        return max(1, 2 ** (self.bits - 1) - 1)

    def integers(self, weight: np.ndarray) -> np.ndarray:
        """The weight as int8, of its own shape; output channels come first."""
        scaled = weight / self.weight.reshape((-1,) + (1,) * (weight.ndim - 1))
        if self.bits == 1:
            return np.where(scaled >= 0, 1, -1).astype(np.int8)
        return np.clip(np.round(scaled), -self.limit, self.limit).astype(np.int8)


Calibration = dict[str, LayerScales]
"""Layer name -> its scales."""
