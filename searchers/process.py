"""A Gaussian process that is refitted for every trial: few hyperparameters, chosen from a grid.

A linear trend catches that quality falls with sparsity and rises with size, a Matérn kernel over
all inputs the rest (Rasmussen and Williams 2006), on a scale of the metric that outliers do not
rule (`warping`). What takes time is done seldom: the shape is chosen by marginal likelihood on at
most 128 results, and kept until there are a quarter more.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from ray_nascomp.searchers.warping import Warp

_TRENDS = (0.3, 3.0)
_LENGTHS = (0.5, 1.0, 2.0)
_NOISES = (1e-3, 1e-2, 1e-1)
_STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
_CHOSEN_ON = 128


class Shape(NamedTuple):
    """Hyperparameters of the process.

    Attributes:
        trend: Variance of the linear part; that of the other part is 1.
        length: Length scale, in the units of the inputs.
        noise: Variance of the noise.
        strengths: How much each metric is warped.
    """

    trend: float
    length: float
    noise: float
    strengths: tuple[float, ...]


def choose_shape(inputs: np.ndarray, targets: np.ndarray) -> Shape:
    """The shape of largest marginal likelihood, the same for all metrics but for how they are warped.

    Args:
        inputs: Encoded configs, shape `(n, d)`, about the unit cube.
        targets: Metrics, shape `(n, m)`, finite.
    """
    inputs, targets = inputs[-_CHOSEN_ON:], targets[-_CHOSEN_ON:]
    n, metrics = targets.shape
    warps = [[Warp(column, strength) for strength in _STRENGTHS] for column in targets.T]
    columns = list(zip(warps, targets.T, strict=True))
    warped = np.array([warp(column) for row, column in columns for warp in row]).reshape(-1, n).T
    slopes = np.array([warp.log_slope(column) for row, column in columns for warp in row])
    slopes = slopes.reshape(metrics, len(_STRENGTHS))
    distances = _distances(inputs, inputs)
    typical = float(np.median(distances[np.triu_indices(n, 1)])) if n > 1 else 1.0
    best, largest = Shape(1.0, typical or 1.0, 1e-2, (0.0,) * metrics), -np.inf
    for trend, factor in itertools.product(_TRENDS, _LENGTHS):
        length = factor * (typical or 1.0)
        values, vectors = np.linalg.eigh(_kernel(inputs, inputs, trend, length))
        squares = (vectors.T @ warped) ** 2
        for noise in _NOISES:
            spread = np.maximum(values, 0) + noise
            variances = ((squares / spread[:, None]).mean(axis=0) + 1e-12).reshape(slopes.shape)
            likelihoods = slopes - 0.5 * (n * np.log(variances) + np.log(spread).sum())
            if likelihoods.max(axis=1).sum() > largest:
                largest = likelihoods.max(axis=1).sum()
                strengths = tuple(_STRENGTHS[i] for i in likelihoods.argmax(axis=1))
                best = Shape(trend, length, noise, strengths)
    return best


class ProcessSurrogate:
    """The process given results.

    Args:
        inputs: Encoded configs, shape `(n, d)`.
        targets: Metrics, shape `(n, m)`, finite.
        shape: See `choose_shape`.
    """

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, shape: Shape) -> None:
        self._inputs, self._shape = inputs, shape
        self._warps = [Warp(column, strength) for column, strength in zip(targets.T, shape.strengths, strict=True)]
        warped = np.empty_like(targets)
        for index, warp in enumerate(self._warps):
            warped[:, index] = warp(targets[:, index])
        kernel = _kernel(inputs, inputs, shape.trend, shape.length) + shape.noise * np.eye(len(inputs))
        self._inverse = np.linalg.inv(kernel)
        self._weights = self._inverse @ warped
        self._variance = (warped * self._weights).mean(axis=0) + 1e-12

    def sample(self, rng: np.random.Generator, queries: np.ndarray, draws: int) -> np.ndarray:
        """Draws of the metrics of queries, each query by itself.

        Args:
            rng: Source of randomness.
            queries: Encoded configs, shape `(queries, d)`.
            draws: How many of each.

        Returns:
            Shape `(draws, queries, m)`.
        """
        kernel = _kernel(queries, self._inputs, self._shape.trend, self._shape.length)
        prior = 1 + self._shape.trend * (_design(queries) ** 2).mean(axis=1)
        left = np.maximum(prior - ((kernel @ self._inverse) * kernel).sum(axis=1), 1e-9)
        mean, deviation = kernel @ self._weights, np.sqrt(left[:, None] * self._variance)
        drawn = mean + deviation * rng.standard_normal((draws, *mean.shape))
        for index, warp in enumerate(self._warps):
            drawn[..., index] = warp.inverse(drawn[..., index])
        return np.asarray(drawn)


def _kernel(one: np.ndarray, other: np.ndarray, trend: float, length: float) -> np.ndarray:
    away = np.sqrt(3) * _distances(one, other) / length
    first, second = _design(one), _design(other)
    return np.asarray((1 + away) * np.exp(-away) + trend * first @ second.T / first.shape[1])


def _design(inputs: np.ndarray) -> np.ndarray:
    """Inputs of the trend: from -1 to 1, and their squares."""
    centred = 2 * inputs - 1
    return np.concatenate([centred, centred**2], axis=1)


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))
