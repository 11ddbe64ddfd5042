"""Weights and inputs of layers as integers: affine ranges, and rounding that makes up for its own errors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_DAMPING = 0.01
_BLOCK = 64
_SHARES = tuple(1 - 0.04 * step for step in range(18))


def affine_range(lowest: float, highest: float) -> tuple[float, int]:
    """Scale and zero point of unsigned 8-bit integers that hold a range of values, and zero exactly."""
    low, high = min(lowest, 0.0), max(highest, 0.0)
    scale = max((high - low) / 255, 1e-8)
    return scale, min(255, max(0, round(-low / scale)))


def round_affine(values: Tensor, scale: float, zero_point: int) -> Tensor:
    """The values as unsigned 8-bit integers have them."""
    return (torch.round(values / scale) + zero_point).clamp(0, 255).sub(zero_point).mul(scale)


def channel_scales(weight: Tensor, limit: int) -> Tensor:
    """Scales with which each output channel's largest weight becomes `limit`, shape `(channels,)`."""
    return (weight.flatten(1).abs().amax(1) / limit).clamp(min=1e-12)


def fitted_scales(weight: Tensor, bits: int) -> Tensor:
    """Scales with which each output channel's weight is rounded with the least squared error, shape `(channels,)`.

    With one bit that is the mean magnitude (Rastegari et al. 2016, arXiv 1603.05279); with 8 bits
    next to the largest weight's; between, some large weights are cut off for finer steps.

    Args:
        weight: Output channels first.
        bits: Bits of the integers, 1..8.
    """
    flat = weight.flatten(1)
    if bits == 1:
        return flat.abs().mean(1).clamp(min=1e-12)
    limit = 2 ** (bits - 1) - 1
    widest = channel_scales(weight, limit)
    if bits == 8:
        return widest
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in _SHARES:
        scales = widest * share
        errors = (round_nearest(flat, scales, limit) - flat).square().sum(1)
        best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    return best


def round_nearest(weight: Tensor, scales: Tensor, limit: int) -> Tensor:
    """The weight, shape `(channels, features)`, at the nearest multiples of its channels' scales."""
    return (weight / scales[:, None]).round().clamp(-limit, limit) * scales[:, None]


def error_spread(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """How a layer's features make up for each other's errors, for `round_compensated`.

    Args:
        covariance: Mean of x x' of what each of the layer's groups reads, shape
            `(groups, features, features)`.

    Returns:
        The features in the order in which they are rounded, those with the largest inputs first,
        shape `(groups, features)`; and, shape `(groups, features, features)` in that order, how the
        error of each (a row) is spread over those after it.
    """
    order = covariance.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    rows = order[:, :, None].expand_as(covariance)
    hessian = covariance.double().gather(1, rows).gather(2, rows.transpose(1, 2))
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal.add_(_DAMPING * diagonal.mean(1, keepdim=True) + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def round_compensated(weight: Tensor, scales: Tensor, limit: int, spread: tuple[Tensor, Tensor]) -> Tensor:
    """The weight at multiples of its channels' scales, such that the layer's output changes least.

    Features are rounded one after the other; the error of each is made up for by the features
    that are still to come (GPTQ: Frantar, Ashkboos, Hoefler and Alistarh 2022, arXiv 2210.17323).

    Args:
        weight: Shape `(channels, ...)`: of each channel the features of the group that it reads.
        scales: Shape `(channels,)`.
        limit: Largest magnitude of an integer.
        spread: What `error_spread` gives for the layer's inputs.
    """
    order, factors = spread
    groups, features = order.shape
    # Features before channels, so that each step works on memory that lies together.
    laid_out = weight.float().reshape(groups, -1, features).transpose(1, 2)
    index = order[:, :, None].expand_as(laid_out)
    remaining = laid_out.gather(1, index)
    rounded = torch.empty_like(remaining)
    # NumPy's calls take a third of the time of torch's on so little data.
    steps, shares, left, done = (tensor.numpy() for tensor in (scales.reshape(groups, -1), factors, remaining, rounded))
    for start in range(0, features, _BLOCK):
        stop = min(start + _BLOCK, features)
        errors = np.empty((groups, stop - start, steps.shape[1]), np.float32)
        for feature in range(start, stop):
            row, nearest, error = left[:, feature], done[:, feature], errors[:, feature - start]
            np.rint(row / steps, out=nearest)
            np.clip(nearest, -limit, limit, out=nearest)
            nearest *= steps
            np.subtract(row, nearest, out=error)
            error /= shares[:, feature, feature, None]
            left[:, feature + 1 : stop] -= shares[:, feature, feature + 1 : stop, None] * error[:, None]
        spread_errors = factors[:, start:stop, stop:].transpose(1, 2)
        remaining[:, stop:].baddbmm_(spread_errors, torch.from_numpy(errors), alpha=-1)
    restored = torch.empty_like(rounded).scatter_(1, index, rounded)
    return restored.transpose(1, 2).reshape(weight.shape).to(weight.dtype)
