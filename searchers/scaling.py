"""Known costs brought to the scale of encoded dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

SPREAD = 0.25


def tabulated(known: Sequence[Mapping[str, float] | None]) -> np.ndarray:
    """Known costs as inputs of a model, shape `(configs, costs)`.

    What is known of a config says much about what is not: a network's size about its accuracy. Costs
    differ by orders of magnitude, hence logarithms, `sign(x) log(1 + |x|)`.

    Args:
        known: What is known of each config; None, a row of NaN, where it is ruled out.
    """
    rows = [row or {} for row in known]
    names = sorted(set().union(*rows))
    table = np.array([[row.get(name, np.nan) for name in names] for row in rows]).reshape(len(rows), len(names))
    return np.asarray(np.sign(table) * np.log1p(np.abs(table)))


class UnitScale:
    """Columns with mean 0.5 and standard deviation 0.25, so that most lies in the unit cube.

    Args:
        table: What the scale is taken from, shape `(n, columns)`; NaN counts as the mean.
    """

    def __init__(self, table: np.ndarray) -> None:
        usable = np.isfinite(table)
        filled = np.where(usable, table, 0.0)
        count = np.maximum(usable.sum(axis=0), 1)
        self._mean = filled.sum(axis=0) / count
        deviation = np.sqrt((np.where(usable, table - self._mean, 0.0) ** 2).sum(axis=0) / count)
        self._deviation = np.where(deviation > 1e-12, deviation, 1.0)

    def __call__(self, table: np.ndarray) -> np.ndarray:
        """The table in this scale."""
        if table.shape[1] < len(self._mean):
            table = np.full((len(table), len(self._mean)), np.nan)
        return np.asarray(0.5 + SPREAD * np.nan_to_num((table - self._mean) / self._deviation, nan=0.0))
