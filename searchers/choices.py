"""A space's dimensions as choices among few options, parents before the dimensions that depend on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_nascomp.space import Dimension, Space

_MOST_LEVELS = 24
_BINS = 12
_WAVES = 4


class Choices:
    """Options of each dimension, and what they have in common.

    A dimension of few values has an option for each, any other a bin for each twelfth of its
    range. Options of an ordered dimension are described by cosines of their place, so that
    neighbours are learnt of together; those of an unordered one by themselves.

    Args:
        space: The space. Columns of all arrays stand in the order of `order`, not of its dimensions.

    Attributes:
        order: Position of each column's dimension in the space, shape `(columns,)`.
        features: Description of each option, shape `(columns, options, features)`.
        exists: Which options there are, shape `(columns, options)`.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self.order = np.array(_parents_first(space.dimensions), dtype=int)
        dimensions = [space.dimensions[i] for i in self.order]
        levels = [_level_count(dimension) for dimension in dimensions]
        self._is_binned = np.array([count is None for count in levels], dtype=bool)
        self._counts = np.array([count or _BINS for count in levels], dtype=int)
        described = [_describe(d, int(n)) for d, n in zip(dimensions, self._counts, strict=True)]
        shape = len(described), max(len(d) for d in described), max(d.shape[1] for d in described)
        self.features = np.zeros(shape, dtype=np.float32)
        self.exists = np.zeros(shape[:2], dtype=bool)
        for column, rows in enumerate(described):
            self.features[column, : len(rows), : rows.shape[1]] = rows
            self.exists[column, : len(rows)] = True
        self._conditions = self._find_conditions(dimensions)

    @property
    def is_conditional(self) -> bool:
        """Whether some dimensions count only beside certain options of others."""
        return any(condition is not None for condition in self._conditions)

    def options(self, encoded: np.ndarray) -> np.ndarray:
        """Options of encoded configs `(n, dimensions)`, shape `(n, columns)`."""
        units = encoded[:, self.order]
        chosen = np.where(self._is_binned, np.floor(units * self._counts), np.rint(units * (self._counts - 1)))
        return np.asarray(np.minimum(chosen.astype(int), self._counts - 1))

    def encoded(self, rng: np.random.Generator, options: np.ndarray) -> np.ndarray:
        """Encoded configs `(n, dimensions)` of options `(n, columns)`; a place in a bin is drawn."""
        within = (options + rng.random(options.shape)) / self._counts
        units = np.where(self._is_binned, within, options / np.maximum(1, self._counts - 1))
        encoded = np.empty_like(units)
        encoded[:, self.order] = units
        return np.asarray(encoded)

    def active(self, configs: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Which columns matter in each config, shape `(n, columns)`."""
        if not self.is_conditional:
            return np.ones((len(configs), len(self.order)), dtype=bool)
        return np.stack([self._space.active(config)[self.order] for config in configs])

    def column_active(self, column: int, options: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Which rows make a column matter, from the columns before it; shape `(n,)`.

        Args:
            column: The column.
            options: Options, shape `(n, columns)`, of which those before `column` are looked at.
            active: Which of these matter, shape `(n, columns)`.
        """
        condition = self._conditions[column]
        if condition is None:
            return np.ones(len(options), dtype=bool)
        parent, wanted = condition
        if parent is None:
            return np.full(len(options), bool(wanted.all()))
        return np.asarray(active[:, parent] & wanted[options[:, parent]])

    def _find_conditions(self, dimensions: list[Dimension]) -> list[tuple[int | None, np.ndarray] | None]:
        """For each column that depends on another: that column, and which of its options are wanted."""
        columns = {dimension.path: column for column, dimension in enumerate(dimensions)}
        always = self._space.active(self._space.decode([0.0] * len(dimensions)))
        found: list[tuple[int | None, np.ndarray] | None] = []
        for column, dimension in enumerate(dimensions):
            if dimension.condition is None:
                found.append(None)
                continue
            path, values = dimension.condition
            parent = columns.get(path)
            if parent is None:  # It depends on a constant.
                found.append((None, np.array([always[self.order[column]]])))
                continue
            places = np.arange(self._counts[parent]) / max(1, self._counts[parent] - 1)
            wanted = [dimensions[parent].from_unit(float(place)) in values for place in places]
            found.append((parent, np.array(wanted)))
        return found


def _parents_first(dimensions: Sequence[Dimension]) -> list[int]:
    position = {dimension.path: i for i, dimension in enumerate(dimensions)}
    order: list[int] = []

    def visit(index: int) -> None:
        condition = dimensions[index].condition
        if index in order:
            return
        if condition is not None and condition[0] in position:
            visit(position[condition[0]])
        order.append(index)

    for index in range(len(dimensions)):
        visit(index)
    return order


def _level_count(dimension: Dimension) -> int | None:
    """Number of values; None if they are too many, or not evenly spaced in the unit interval."""
    if dimension.kind == "categorical":
        return len(dimension.categories)
    if dimension.step is None or dimension.log:
        return None
    count = round((dimension.upper - dimension.lower) / dimension.step) + 1
    return count if count <= _MOST_LEVELS else None


def _describe(dimension: Dimension, count: int) -> np.ndarray:
    """Features of a dimension's options, shape `(count, features)`."""
    if not dimension.is_ordinal or count <= _WAVES + 1:
        return np.eye(count)
    places = (np.arange(count) + 0.5) / count
    return np.asarray(np.sqrt(2) * np.cos(np.pi * places[:, None] * np.arange(1, _WAVES + 1)))
