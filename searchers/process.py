"""A Gaussian process that is refitted for every trial: few hyperparameters, chosen from a grid.

A linear trend catches that quality falls with sparsity and rises with size, a Matérn kernel over
all inputs the rest (Rasmussen and Williams 2006). What takes time is done seldom: the shape is
chosen by marginal likelihood on at most 128 results, and kept until there are a quarter more.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

_TRENDS = (0.3, 3.0)
_LENGTHS = (0.5, 1.0, 2.0)
_NOISES = (1e-3, 1e-2, 1e-1)
_CHOSEN_ON = 128


class Shape(NamedTuple):
    """Hyperparameters of the process.

    Attributes:
        trend: Variance of the linear part; that of the other part is 1.
        length: Length scale, in the units of the inputs.
        noise: Variance of the noise.
    """

    trend: float
    length: float
    noise: float


def choose_shape(inputs: np.ndarray, targets: np.ndarray) -> Shape:
    """The shape of largest marginal likelihood, the same for all metrics.

    Args:
        inputs: Encoded configs, shape `(n, d)`, about the unit cube.
        targets: Metrics, shape `(n, m)`, finite.
    """
    inputs, targets = inputs[-_CHOSEN_ON:], targets[-_CHOSEN_ON:]
    n = len(inputs)
    scaled = _standardised(targets)
    distances = _distances(inputs, inputs)
    typical = float(np.median(distances[np.triu_indices(n, 1)])) if n > 1 else 1.0
    best, largest = Shape(1.0, typical or 1.0, 1e-2), -np.inf
    for trend, length in itertools.product(_TRENDS, _LENGTHS):
        kernel = _kernel(inputs, inputs, Shape(trend, length * (typical or 1.0), 0.0))
        values, vectors = np.linalg.eigh(kernel)
        squares = (vectors.T @ scaled) ** 2
        for noise in _NOISES:
            spread = np.maximum(values, 0) + noise
            variances = (squares / spread[:, None]).mean(axis=0) + 1e-12
            likelihood = -0.5 * (n * np.log(variances).sum() + scaled.shape[1] * np.log(spread).sum())
            if likelihood > largest:
                best, largest = Shape(trend, length * (typical or 1.0), noise), likelihood
    return best


class ProcessSurrogate:
    """The process given results.

    Args:
        inputs: Encoded configs, shape `(n, d)`.
        targets: Metrics, shape `(n, m)`, finite.
        shape: See `choose_shape`.
    """

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, shape: Shape) -> None:
        self._inputs, self._targets, self._shape = inputs, targets, shape
        scaled = _standardised(targets)
        kernel = _kernel(inputs, inputs, shape) + shape.noise * np.eye(len(inputs))
        self._inverse = np.linalg.inv(kernel)
        self._weights = self._inverse @ scaled
        self._variance = (scaled * self._weights).mean(axis=0) + 1e-12

    def predict(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations, each of shape `(queries, m)`."""
        kernel = _kernel(queries, self._inputs, self._shape)
        prior = 1 + self._shape.trend * (_design(queries) ** 2).mean(axis=1)
        left = np.maximum(prior - ((kernel @ self._inverse) * kernel).sum(axis=1), 1e-9)
        scale = self._targets.std(axis=0) + 1e-12
        mean = kernel @ self._weights * scale + self._targets.mean(axis=0)
        return mean, np.sqrt(left[:, None] * self._variance) * scale


def _kernel(one: np.ndarray, other: np.ndarray, shape: Shape) -> np.ndarray:
    away = np.sqrt(3) * _distances(one, other) / shape.length
    first, second = _design(one), _design(other)
    trend = shape.trend * first @ second.T / first.shape[1]
    return np.asarray((1 + away) * np.exp(-away) + trend)


def _design(inputs: np.ndarray) -> np.ndarray:
    """Inputs of the trend: from -1 to 1, and their squares."""
    centred = 2 * inputs - 1
    return np.concatenate([centred, centred**2], axis=1)


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _standardised(targets: np.ndarray) -> np.ndarray:
    return np.asarray((targets - targets.mean(axis=0)) / (targets.std(axis=0) + 1e-12))
