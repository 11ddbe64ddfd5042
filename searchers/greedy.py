"""Greedy search for a cheaper model: a step of cost at a time, from the dense model down.

After NetAdapt (Yang et al. 2018, arXiv 1804.03230): from the incumbent, each dimension alone is
moved until the known cost falls by one step; the candidates are tried, in parallel, and the one
that keeps the first objective best is the next incumbent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal
from ray_nascomp.observations import Observation
from ray_nascomp.searchers.base import CostFunction, GoalSearcher

_STEPS = 12


class GreedySearch(GoalSearcher):
    """Greedy descent in one known cost.

    Args:
        goal: See `GoalSearcher`. The first objective that the cost model does not know decides.
        cost_model: See `GoalSearcher`; needed here.
        metric: The known metric to bring down, such as "macs".
        reduction: Share of the cost that a step takes away, in (0, 1).
        seed: See `GoalSearcher`.
        points_to_evaluate: See `GoalSearcher`.
        warm_start: See `GoalSearcher`.
        prior: Function from a config to how much it is expected to lose, such as `expected` of a measured
            `Sensitivity`; each step then tries the third of its candidates that is expected to lose least.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(
        self,
        goal: Goal,
        cost_model: CostFunction | None = None,
        *,
        metric: str,
        reduction: float = 0.1,
        seed: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        warm_start: Iterable[Observation] | str | Path | Any = None,
        prior: Callable[[Mapping[str, Any]], float] | None = None,
    ) -> None:
        if cost_model is None:
            raise ConfigError("cost_model: None was given, GreedySearch needs a function config -> metrics")
        if not 0 < reduction < 1:
            raise ConfigError(f"reduction: {reduction!r} was given, a number between 0 and 1 is allowed")
        super().__init__(goal, cost_model, seed=seed, points_to_evaluate=points_to_evaluate, warm_start=warm_start)
        self._metric = metric
        self._reduction = reduction
        self._prior = prior
        self._incumbent: dict[str, Any] | None = None
        self._round: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []

    def propose(self) -> dict[str, Any]:
        """The next candidate of the round; at the end of a round the best becomes the incumbent.

        With trials still running, or after the last step, a random neighbour of the incumbent.
        """
        if self._incumbent is None:
            self._incumbent = self._dearest()
            self._open_round()
            return self._incumbent
        if not self._waiting and not any(self._is_pending(config) for config in self._round):
            self._close_round()
        if self._waiting:
            return self._waiting.pop(0)
        return self._neighbour(self._incumbent)

    def own_state(self) -> dict[str, Any]:
        """The incumbent and its candidates."""
        return {"incumbent": self._incumbent, "round": self._round, "waiting": self._waiting}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        self._incumbent, self._round, self._waiting = state["incumbent"], state["round"], state["waiting"]

    def _cost(self, config: Mapping[str, Any]) -> float:
        """The known cost, infinite for what cannot be carried out.

        Raises:
            ConfigError: If the cost model does not know the metric.
        """
        known = self.known_metrics(config)
        if known is None:
            return np.inf
        if self._metric not in known:
            raise ConfigError.unknown("metric", self._metric, sorted(known))
        return known[self._metric]

    def _dearest(self) -> dict[str, Any]:
        """The affordable config of largest cost, by moving one dimension after the other."""
        config = self.space.sample(self.rng)
        while not np.isfinite(self._cost(config)):
            config = self.space.sample(self.rng)
        for index in range(len(self.space)):
            options = [option for option in self._moves(config, index) if np.isfinite(self._cost(option))]
            config = max([config, *options], key=self._cost)
        return config

    def _open_round(self) -> None:
        """One candidate a dimension: the dearest of its moves that takes away a step of cost."""
        assert self._incumbent is not None
        target = self._cost(self._incumbent) * (1 - self._reduction)
        found: dict[str, dict[str, Any]] = {}
        for index in range(len(self.space)):
            moves = [m for m in self._moves(self._incumbent, index) if self._cost(m) < self._cost(self._incumbent)]
            # Where no move takes away so much, the largest does: late dimensions are not left out.
            enough = [move for move in moves if self._cost(move) <= target]
            if moves:
                move = max(enough, key=self._cost) if enough else min(moves, key=self._cost)
                found[self.key(move)] = move
        self._round = list(found.values())
        if self._prior is not None:
            self._round.sort(key=self._prior)
            self._round = self._round[: max(1, math.ceil(len(self._round) / 3))]
        self._waiting = [config for config in self._round if self.is_new(config)]

    def _close_round(self) -> None:
        """The candidate that keeps the deciding objective best is the next incumbent."""
        keys = {self.key(config) for config in self._round}
        tried = [o for o in self.final_observations() if self.key(o.config) in keys]
        if tried:
            self._incumbent = dict(min(tried, key=self._loss).config)
            self._open_round()

    def _loss(self, observation: Observation) -> float:
        known = self.known_metrics(observation.config) or {}
        losses = self.goal.losses(observation.metrics)
        deciding = next((i for i, o in enumerate(self.goal.objectives) if o.metric not in known), 0)
        return float(losses[deciding]) if np.isfinite(losses[deciding]) else np.inf

    def _is_pending(self, config: Mapping[str, Any]) -> bool:
        key = self.key(config)
        return any(self.key(pending) == key for pending in self.pending)

    def _moves(self, config: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
        """The config with other values of one dimension, a continuous one in steps."""
        dimension = self.space.dimensions[index]
        levels = dimension.levels or tuple(dimension.from_unit(i / _STEPS) for i in range(_STEPS + 1))
        values = self.space.values(config)
        return [self.space.to_config([*values[:index], v, *values[index + 1 :]]) for v in levels if v != values[index]]

    def _neighbour(self, config: Mapping[str, Any]) -> dict[str, Any]:
        moves = self._moves(config, int(self.rng.integers(len(self.space))))
        return moves[int(self.rng.integers(len(moves)))] if moves else self.space.sample(self.rng)
