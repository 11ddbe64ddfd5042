"""A ladder of models that are compressed alike everywhere, so that there is something at each cost.

What uniform compression gives is where a search should begin rather than end: a few trials of it are
worth more than as many random ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ray_nascomp.space import Role, Space

Costs = Callable[[Sequence[Mapping[str, Any]]], Sequence[float]]
"""Function from configs to their costs, infinite for what cannot be carried out."""

_STEPS = 12
_DRAWS = 64
_SMALLER_IS_CHEAPER = (Role.ARCHITECTURE, Role.BITS, Role.RANK)


def moves(space: Space, config: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    """The config with other values of one dimension, a continuous one in steps."""
    dimension = space.dimensions[index]
    levels = dimension.levels or tuple(dimension.from_unit(i / _STEPS) for i in range(_STEPS + 1))
    values = space.values(config)
    return [space.to_config([*values[:index], v, *values[index + 1 :]]) for v in levels if v != values[index]]


def dense(space: Space, costs: Costs) -> dict[str, Any] | None:
    """The config of largest finite cost, one dimension after the other; None if none could be found to start from."""
    # Always the same: a ladder follows from the space and the costs alone.
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(_DRAWS)]
    config = next((c for c, cost in zip(drawn, costs(drawn), strict=True) if np.isfinite(cost)), None)
    if config is None:
        return None
    for index in range(len(space)):
        options = [config, *moves(space, config, index)]
        known = np.array(costs(options))
        config = options[int(np.argmax(np.where(np.isfinite(known), known, -np.inf)))]
    return config


def rungs(space: Space, costs: Costs, top: Mapping[str, Any], depths: Sequence[float]) -> list[dict[str, Any]]:
    """Configs in which each dimension goes as far down its own costs as the others.

    What costs the same differs at random from rung to rung.

    Args:
        space: The space.
        costs: See `Costs`.
        top: Where the ladder begins; see `dense`.
        depths: How far down each rung is, from 0, the top, to 1, where each dimension is as cheap as it can be.

    Returns:
        Those that can be carried out, in the order of their depths.
    """
    rng = np.random.default_rng(0)
    values: list[list[Any]] = [[] for _ in depths]
    carried: defaultdict[tuple[int, Role], float] = defaultdict(float)
    for index in range(len(space)):
        options = [dict(top), *moves(space, top, index)]
        known = costs(options)
        falling: dict[float, list[Any]] = {}
        for place in np.argsort(-np.array(known), kind="stable").tolist():
            if known[place] <= known[0]:
                falling.setdefault(known[place], []).append(space.values(options[place])[index])
        role, levels = space.dimensions[index].role, list(falling.values())
        for rung, depth in enumerate(depths):
            exact = depth * (len(levels) - 1)
            if len(levels) == 2:
                # Of blocks that are kept or not, half are kept half way: what rounding leaves over, the next one gets.
                exact += carried[rung, role]
                carried[rung, role] = exact - round(exact)
            alike = levels[round(exact)]
            values[rung].append(alike[int(rng.integers(len(alike)))])
    found = [space.to_config(rung) for rung in values]
    return [config for config, cost in zip(found, costs(found), strict=True) if np.isfinite(cost)]


def costs_by_role(space: Space) -> Costs:
    """Costs for want of a cost model: the more is removed, and the smaller what is left, the cheaper."""
    signs = np.zeros(len(space))
    for index, dimension in enumerate(space.dimensions):
        if dimension.role is Role.SPARSITY:
            signs[index] = -1.0
        elif dimension.role in _SMALLER_IS_CHEAPER and dimension.is_ordinal:
            signs[index] = 1.0

    def costs(configs: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float(cost) for cost in space.encode(configs) @ signs]

    return costs
