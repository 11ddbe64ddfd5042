"""Steps towards smaller networks: more sparsity, fewer bits, lower ranks; and which network contains which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_nascomp.space import Dimension, Role, Space

_STRUCTURE = (Role.SPARSITY, Role.RANK)
_COMPRESSING = (*_STRUCTURE, Role.BITS)
_TRAINING = (Role.TRAINING, Role.DISTILLATION)
_MOVED_SHARE = 0.5
_CONTINUOUS_STEP = 0.1
_MAX_STEPS = 3


def contains(space: Space, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a network of config `other` can be cut out of one of config `one`.

    Sparsities are no higher and ranks no lower in `one`; whatever else decides the structure, the
    architecture and the methods, is the same.
    """
    for dimension, before, after in zip(space.dimensions, space.values(one), space.values(other), strict=True):
        if dimension.role is Role.SPARSITY and after < before:
            return False
        if dimension.role is Role.RANK and after > before:
            return False
        if dimension.role is Role.ARCHITECTURE and after != before:
            return False
        if dimension.path[0] == "prune" and dimension.role is not Role.SPARSITY and after != before:
            return False
    return True


def smaller(rng: np.random.Generator, space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config some steps further: each sparsity, rank and bits that can, with a chance of a half; one at least.

    Where nothing can be compressed further, the structure stays. The training changes a little.
    """
    values = space.values(config)
    movable = [
        i for i, d in enumerate(space.dimensions) if d.role in _COMPRESSING and _further(d, values[i], 1) != values[i]
    ]
    chosen = [i for i in movable if rng.random() < _MOVED_SHARE] or movable
    for index in chosen:
        values[index] = _further(space.dimensions[index], values[index], int(rng.integers(1, _MAX_STEPS + 1)))
    return with_training(rng, space, space.to_config(values), config)


def with_training(
    rng: np.random.Generator, space: Space, config: Mapping[str, Any], winner: Mapping[str, Any]
) -> dict[str, Any]:
    """The config, trained nearly as the winner is: its learning rate and distillation, one of them a step aside."""
    values, theirs = space.values(config), space.values(winner)
    training = [i for i, d in enumerate(space.dimensions) if d.role in _TRAINING and d.path[0] == "finetune"]
    for index in training:
        values[index] = theirs[index]
    if training:
        index = training[int(rng.integers(len(training)))]
        dimension = space.dimensions[index]
        side = 1 if rng.random() < 0.5 else -1
        values[index] = _shifted(dimension, values[index], side)
    return space.to_config(values)


def _further(dimension: Dimension, value: Any, steps: int) -> Any:
    """The value some steps more compressed; bits in the order of their size."""
    if dimension.kind == "categorical":
        order = sorted(dimension.categories, reverse=dimension.role is not Role.SPARSITY)
        return order[min(order.index(value) + steps, len(order) - 1)]
    return _shifted(dimension, value, steps if dimension.role is Role.SPARSITY else -steps)


def _shifted(dimension: Dimension, value: Any, steps: int) -> Any:
    """The value some levels further up, within the dimension."""
    if dimension.kind == "categorical":
        position = dimension.categories.index(value) + steps
        return dimension.categories[min(max(position, 0), len(dimension.categories) - 1)]
    size = _CONTINUOUS_STEP
    if dimension.step is not None and not dimension.log and dimension.upper > dimension.lower:
        size = dimension.step / (dimension.upper - dimension.lower)
    return dimension.from_unit(dimension.to_unit(value) + steps * size)
