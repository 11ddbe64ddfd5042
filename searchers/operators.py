"""Variation of configs that knows what a dimension decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_nascomp.space import Dimension, Role

_LATE = (Role.BITS, Role.DISTILLATION, Role.TRAINING)
_CONTINUOUS_STEP = 0.12


def crossover(rng: np.random.Generator, one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """Each value from one of two parents, one of them preferred."""
    from_one = rng.random(len(one)) < rng.uniform(0.2, 0.8)
    return [a if first else b for a, b, first in zip(one, other, from_one.tolist(), strict=True)]


def mutate(
    rng: np.random.Generator, dimensions: Sequence[Dimension], values: Sequence[Any], by_role: bool = True
) -> list[Any]:
    """A neighbour of a config.

    One of four moves: a few dimensions take a small step; all dimensions of one role shift
    together; only dimensions of late stages (bits, distillation, training) move, so that the
    earlier stages are shared with the parent; one dimension is drawn anew.

    Args:
        rng: Source of randomness.
        dimensions: The space's dimensions.
        values: One value a dimension.
        by_role: False leaves out the moves that look at roles.
    """
    result = list(values)
    drawn = rng.random()
    if by_role:
        move = 0 if drawn < 0.45 else 1 if drawn < 0.7 else 2 if drawn < 0.85 else 3
    else:
        move = 0 if drawn < 0.75 else 3
    if move == 1:
        roles = sorted({d.role for d in dimensions if d.is_ordinal}, key=lambda role: role.value)
        if roles:
            role = roles[int(rng.integers(len(roles)))]
            direction = 1 if rng.random() < 0.5 else -1
            size = int(rng.integers(1, 4))
            moves = (rng.random(len(dimensions)) < 0.9).tolist()
            for index, dimension in enumerate(dimensions):
                if dimension.role is role and dimension.is_ordinal and moves[index]:
                    result[index] = _shift(dimension, result[index], direction * size)
            return result
    if move == 3:
        index = int(rng.integers(len(dimensions)))
        result[index] = dimensions[index].sample(rng)
        return result
    candidates = [i for i, d in enumerate(dimensions) if move != 2 or d.role in _LATE] or list(range(len(dimensions)))
    count = min(len(candidates), 1 + int(rng.geometric(0.5)))
    for index in rng.choice(candidates, size=count, replace=False):
        result[index] = _step(rng, dimensions[index], result[index])
    return result


def _step(rng: np.random.Generator, dimension: Dimension, value: Any) -> Any:
    """A neighbouring value; of an unordered dimension any other."""
    if not dimension.is_ordinal:
        others = [c for c in dimension.categories if c != value]
        return others[int(rng.integers(len(others)))] if others else value
    direction = 1 if rng.random() < 0.5 else -1
    return _shift(dimension, value, direction * int(rng.geometric(0.5)))


def _shift(dimension: Dimension, value: Any, steps: int) -> Any:
    """The value some levels further, reflected at the ends."""
    levels = len(dimension.categories) if dimension.kind == "categorical" else None
    if levels is None and dimension.step is not None and not dimension.log:
        levels = round((dimension.upper - dimension.lower) / dimension.step) + 1
    size = 1 / max(1, levels - 1) if levels is not None else _CONTINUOUS_STEP
    unit = dimension.to_unit(value) + steps * size
    if unit < 0 or unit > 1:
        unit = dimension.to_unit(value) - steps * size
    return dimension.from_unit(unit)
