"""Metrics on a scale on which outliers are none, as in warped Gaussian processes (Snelson et al. 2004).

A few configs that break a network have accuracies tens of deviations from all others. Unwarped, a
process of such results describes these few and hardly the rest.
"""

from __future__ import annotations

import numpy as np

_QUARTILES = 1.349  # Of a standard normal, from the first to the third.
_BEYOND = 1.0


class Warp:
    """An inverse hyperbolic sine of a metric: linear about its median, logarithmic far from it.

    Args:
        values: The metric, finite, shape `(n,)`.
        strength: 0 keeps the metric linear; with 1 the logarithm begins about one deviation from
            the median.
    """

    def __init__(self, values: np.ndarray, strength: float) -> None:
        low, self._centre, high = np.quantile(values, (0.25, 0.5, 0.75))
        self._width = float((high - low) / _QUARTILES or values.std() or 1.0)
        self._strength = strength
        bent = self._bent(values)
        self._mean, self._deviation = bent.mean(), bent.std() + 1e-12
        self._range = np.array([bent.min(), bent.max()]) + _BEYOND * self._deviation * np.array([-1, 1])

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The metric warped, with mean 0 and standard deviation 1 for the values that the warp was made from."""
        return np.asarray((self._bent(values) - self._mean) / self._deviation)

    def inverse(self, warped: np.ndarray) -> np.ndarray:
        """The metric again, at most a deviation beyond what the warp was made from."""
        bent = np.clip(warped * self._deviation + self._mean, *self._range)
        if self._strength:
            bent = np.sinh(self._strength * bent) / self._strength
        return np.asarray(self._centre + self._width * bent)

    def log_slope(self, values: np.ndarray) -> float:
        """Sum of the logarithms of the warp's slope at values: what its densities have to be compared by."""
        steep = -0.5 * np.log1p((self._strength * (values - self._centre) / self._width) ** 2)
        return float((steep - np.log(self._width * self._deviation)).sum())

    def _bent(self, values: np.ndarray) -> np.ndarray:
        away = (values - self._centre) / self._width
        return np.asarray(np.arcsinh(self._strength * away) / self._strength if self._strength else away)
