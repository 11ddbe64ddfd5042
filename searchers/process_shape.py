"""The shape of a metric's process: what is most likely given at most 128 results.

First from a grid, where all inputs are alike; then by gradient, each input by itself, as far as
results outweigh a prior about the grid's best (MacKay 1994, automatic relevance determination).
"""

from __future__ import annotations

import itertools

import numpy as np

from ray_nascomp.searchers.process import Shape, covariance, design, distances
from ray_nascomp.searchers.warping import Warp

_TRENDS = (0.3, 3.0)
_LENGTHS = (0.5, 1.0, 2.0)
_NOISES = (1e-3, 1e-2, 1e-1)
_STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
_CHOSEN_ON = 128
_STEPS = 30
# Deviations of the logarithms' prior, and how many of them a step may lead away.
_FREE, _FREE_NOISE, _FARTHEST = 1.0, 1.5, 4.0


def choose_shapes(inputs: np.ndarray, targets: np.ndarray) -> list[Shape]:
    """The shape of each metric's process.

    Args:
        inputs: Encoded configs, about the unit cube, shape `(n, d)`.
        targets: Metrics, shape `(n, m)`, finite.
    """
    inputs, targets = inputs[-_CHOSEN_ON:], targets[-_CHOSEN_ON:]
    alike = _alike(inputs, targets)
    return [_by_input(inputs, column, shape) for column, shape in zip(targets.T, alike, strict=True)]


def _alike(inputs: np.ndarray, targets: np.ndarray) -> list[Shape]:
    """The grid's best shapes, the same for all metrics but for how they are warped."""
    n, width = inputs.shape
    metrics = targets.shape[1]
    warps = [[Warp(column, strength) for strength in _STRENGTHS] for column in targets.T]
    columns = list(zip(warps, targets.T, strict=True))
    warped = np.array([warp(column) for row, column in columns for warp in row]).reshape(-1, n).T
    slopes = np.array([warp.log_slope(column) for row, column in columns for warp in row])
    slopes = slopes.reshape(metrics, len(_STRENGTHS))
    apart = distances(inputs, inputs)[np.triu_indices(n, 1)]
    typical = (float(np.median(apart)) if n > 1 else 1.0) or 1.0
    best, largest = [Shape(np.full(width, typical), np.full(width, 0.5 / width), 1e-2, 0.0)] * metrics, -np.inf
    for trend, factor in itertools.product(_TRENDS, _LENGTHS):
        shape = Shape(np.full(width, factor * typical), np.full(width, trend / (2 * width)), 0.0, 0.0)
        values, vectors = np.linalg.eigh(covariance(inputs, inputs, shape))
        squares = (vectors.T @ warped) ** 2
        for noise in _NOISES:
            spread = np.maximum(values, 0) + noise
            variances = ((squares / spread[:, None]).mean(axis=0) + 1e-12).reshape(slopes.shape)
            likelihoods = slopes - 0.5 * (n * np.log(variances) + np.log(spread).sum())
            if likelihoods.max(axis=1).sum() > largest:
                largest = likelihoods.max(axis=1).sum()
                strengths = [_STRENGTHS[i] for i in likelihoods.argmax(axis=1)]
                best = [shape._replace(noise=noise, strength=strength) for strength in strengths]
    return best


def _by_input(inputs: np.ndarray, column: np.ndarray, start: Shape) -> Shape:
    """The shape of largest posterior density about the start, whose warp it keeps."""
    from scipy.linalg import LinAlgError, cho_factor, cho_solve
    from scipy.optimize import minimize

    n, width = inputs.shape
    basis, warped = design(inputs), Warp(column, start.strength)(column)
    prior = np.log(np.concatenate([start.lengths, start.trends, [start.noise]]))
    spread = np.append(np.full(2 * width, _FREE), _FREE_NOISE)

    def loss(logarithms: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative logarithm of the density, the process's variance integrated out, and its gradient."""
        lengths, trends, noise = _parts(logarithms)
        scaled = inputs / lengths
        away = np.sqrt(3) * distances(scaled, scaled)
        decay = np.exp(-away)
        kernel = (1 + away) * decay + (basis * np.tile(trends, 2)) @ basis.T + noise * np.eye(n)
        try:
            factor = cho_factor(kernel, lower=True)
        except LinAlgError:
            return 1e10, np.zeros_like(logarithms)
        inverse = cho_solve(factor, np.eye(n))
        weights = inverse @ warped
        variance = float(warped @ weights) / n + 1e-12
        # By the kernel's entries; then by each hyperparameter through them.
        slope = np.outer(weights, weights) / variance - inverse
        near = 3 * slope * decay
        by_length = 2 * (near.sum(axis=1) @ scaled**2 - ((near @ scaled) * scaled).sum(axis=0))
        by_trend = ((slope @ basis) * basis).sum(axis=0).reshape(2, width).sum(axis=0) * trends
        gradient = 0.5 * np.concatenate([by_length, by_trend, [np.trace(slope) * noise]])
        distant = (logarithms - prior) / spread
        likelihood = -0.5 * n * np.log(variance) - np.log(np.diag(factor[0])).sum()
        return 0.5 * float(distant @ distant) - likelihood, distant / spread - gradient

    bounds = list(zip(prior - _FARTHEST * spread, prior + _FARTHEST * spread, strict=True))
    found = minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS})
    lengths, trends, noise = _parts(found.x)
    return Shape(lengths, trends, noise, start.strength)


def _parts(logarithms: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Lengths, trends and noise."""
    width = len(logarithms) // 2
    values = np.exp(logarithms)
    return values[:width], values[width : 2 * width], float(values[-1])
