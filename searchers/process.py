"""A Gaussian process that is refitted for every trial, with a relevance of its own for each input.

A trend of each input catches that quality falls with sparsity and rises with size, a Matérn kernel
over all inputs the rest (Rasmussen and Williams 2006), on a scale of the metric that outliers do
not rule (`warping`). What takes time, its shape (`process_shape`), is chosen seldom.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ray_nascomp.searchers.warping import Warp

_NORMAL = NormalDist()


class Shape(NamedTuple):
    """Hyperparameters of the process of one metric; the variance of what is no trend is 1.

    Attributes:
        lengths: Length scale along each input, shape `(d,)`.
        trends: Variance of each input's trend, shape `(d,)`.
        noise: Variance of the noise.
        strength: How much the metric is warped.
    """

    lengths: np.ndarray
    trends: np.ndarray
    noise: float
    strength: float


class ProcessSurrogate:
    """Processes of some metrics, given results.

    Args:
        inputs: Encoded configs, about the unit cube, shape `(n, d)`.
        targets: Metrics, shape `(n, m)`, finite.
        shapes: Shape of each metric's process.
    """

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, shapes: Sequence[Shape]) -> None:
        columns = zip(targets.T, shapes, strict=True)
        self._processes = [_Process(inputs, column, shape) for column, shape in columns]

    def sample(self, rng: np.random.Generator, queries: np.ndarray, draws: int) -> np.ndarray:
        """Random draws of the metrics of queries, each query by itself.

        Args:
            rng: Source of randomness.
            queries: Encoded configs, shape `(queries, d)`.
            draws: How many of each.

        Returns:
            Shape `(draws, queries, m)`.
        """
        return self._at(queries, rng.standard_normal((draws, len(queries), len(self._processes))))

    def quantiles(self, rng: np.random.Generator, queries: np.ndarray, draws: int) -> np.ndarray:
        """As `sample`, evenly spread over each metric's distribution rather than random.

        What is expected of queries can be compared by fewer of them. Metrics are paired at random,
        for all queries alike.
        """
        even = np.array([_NORMAL.inv_cdf((number + 0.5) / draws) for number in range(draws)])
        even /= even.std() or 1.0
        paired = np.stack([rng.permutation(even) for _ in self._processes], axis=1)
        return self._at(queries, np.broadcast_to(paired[:, None], (draws, len(queries), len(self._processes))))

    def _at(self, queries: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        columns = zip(self._processes, np.moveaxis(deviations, 2, 0), strict=True)
        return np.stack([process(queries, column) for process, column in columns], axis=2)


class _Process:
    """The process of one metric."""

    def __init__(self, inputs: np.ndarray, column: np.ndarray, shape: Shape) -> None:
        self._inputs, self._shape = inputs, shape
        self._basis = np.tile(shape.trends, 2)[:, None] * design(inputs).T
        self._warp = Warp(column, shape.strength)
        warped = self._warp(column)
        self._inverse = np.linalg.inv(covariance(inputs, inputs, shape) + shape.noise * np.eye(len(inputs)))
        self._weights = self._inverse @ warped
        self._variance = float(warped @ self._weights) / len(warped) + 1e-12

    def __call__(self, queries: np.ndarray, deviations: np.ndarray) -> np.ndarray:
        """The metric of queries, so many of the process's own deviations from its mean there."""
        covered = covariance(queries, self._inputs, self._shape)
        prior = 1 + (design(queries) ** 2) @ np.tile(self._shape.trends, 2)
        left = np.maximum(prior - ((covered @ self._inverse) * covered).sum(axis=1), 1e-9)
        return self._warp.inverse(covered @ self._weights + np.sqrt(left * self._variance) * deviations)


def process_variance(inputs: np.ndarray, warped: np.ndarray, shape: Shape) -> float:
    """The variance by which covariance and noise have to be multiplied for these results."""
    kernel = covariance(inputs, inputs, shape) + shape.noise * np.eye(len(inputs))
    return float(warped @ np.linalg.solve(kernel, warped)) / len(warped) + 1e-12


def covariance(one: np.ndarray, other: np.ndarray, shape: Shape) -> np.ndarray:
    """Of the process without noise, shape `(len(one), len(other))`."""
    away = np.sqrt(3) * distances(one / shape.lengths, other / shape.lengths)
    return np.asarray((1 + away) * np.exp(-away) + (design(one) * np.tile(shape.trends, 2)) @ design(other).T)


def design(inputs: np.ndarray) -> np.ndarray:
    """What trends are made of: inputs from -1 to 1, and their squares, shape `(n, 2 d)`."""
    centred = 2 * inputs - 1
    return np.concatenate([centred, centred**2], axis=1)


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Euclidean, shape `(len(one), len(other))`."""
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))
