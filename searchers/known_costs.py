"""What a cost model knows of configs, each asked for once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_nascomp.errors import InfeasibleError
from ray_nascomp.goals import Constraint
from ray_nascomp.space import Space

CostFunction = Callable[[Mapping[str, Any]], Mapping[str, float]]
Known = dict[str, float] | None
"""Known metrics of a config; None if they rule it out."""

_LIMIT = 20_000


class KnownCosts:
    """A cost model's answers.

    Args:
        cost_model: See `GoalSearcher`; with None nothing is known.
        constraints: Bounds; where a known metric breaks one, the config is ruled out.
    """

    def __init__(self, cost_model: CostFunction | None, constraints: Sequence[Constraint]) -> None:
        self._cost_model = cost_model
        self._constraints = constraints
        self._answers: dict[str, Known] = {}

    def of(self, space: Space, configs: Sequence[Mapping[str, Any]]) -> list[Known]:
        """What is known of each config, asked for at once where the cost model has a method `many`."""
        if self._cost_model is None:
            return [{} for _ in configs]
        if len(self._answers) >= _LIMIT:
            self._answers.clear()
        keys = [space.key(config) for config in configs]
        fresh = {key: config for key, config in zip(keys, configs, strict=True) if key not in self._answers}
        many = getattr(self._cost_model, "many", None)
        if many is not None and len(fresh) > 1:
            table = many(list(fresh.values()))
            for row, key in enumerate(fresh):
                metrics = {name: float(values[row]) for name, values in table.items()}
                self._answers[key] = None if any(map(math.isnan, metrics.values())) else self._within_bounds(metrics)
        else:
            self._answers.update({key: self._ask(config) for key, config in fresh.items()})
        return [self._answers[key] for key in keys]

    def _ask(self, config: Mapping[str, Any]) -> Known:
        assert self._cost_model is not None
        try:
            metrics = {name: float(value) for name, value in self._cost_model(config).items()}
        except InfeasibleError:
            return None
        return self._within_bounds(metrics)

    def _within_bounds(self, metrics: dict[str, float]) -> Known:
        for constraint in self._constraints:
            value = metrics.get(constraint.metric)
            if value is not None and constraint.violation(value) > 0:
                return None
        return metrics
