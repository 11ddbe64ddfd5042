"""Greedy search for a cheaper model: a step of cost at a time, from the dense model down.

First a ladder of models that are compressed alike everywhere, so that there is something at each
cost. Then NetAdapt (Yang et al. 2018, arXiv 1804.03230): from the incumbent, each dimension alone is
moved until the known cost falls by one step; the candidates are tried, in parallel, and the one
that keeps the first objective best is the next incumbent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal
from ray_nascomp.observations import Observation
from ray_nascomp.pareto import front_indices
from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.known_costs import CostFunction
from ray_nascomp.searchers.ladder import dense, moves, rungs

# How far down the ladder its rungs are: the coarsest first.
_RUNGS = (0.5, 1.0, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875)


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
        self._lowered = metric
        self._reduction = reduction
        self._prior = prior
        self._incumbent: dict[str, Any] | None = None
        self._ladder: list[dict[str, Any]] = []
        self._round: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []

    def propose(self) -> dict[str, Any]:
        """The dense model, the ladder, and then the next candidate of the round.

        At the end of a round the best becomes the incumbent. With trials still running, or after the
        last step, a random neighbour of a result on the front.
        """
        if self._incumbent is None:
            costs = partial(self.known_costs, self._lowered)
            top = dense(self.space, costs)
            self._incumbent = self.space.sample(self.rng) if top is None else top
            self._ladder = rungs(self.space, costs, self._incumbent, _RUNGS)
            self._open_round()
            return self._incumbent
        if self._ladder:
            return self._ladder.pop(0)
        if not self._waiting and not any(self._is_pending(config) for config in self._round):
            self._close_round()
        if self._waiting:
            return self._waiting.pop(0)
        finals = self.final_observations()
        front = front_indices(self.goal, [o.metrics for o in finals])
        return self._neighbour(finals[int(self.rng.choice(front))].config if front else self._incumbent)

    def own_state(self) -> dict[str, Any]:
        """The incumbent, its candidates, and what is left of the ladder."""
        places = {"round": self._round, "waiting": self._waiting, "ladder": self._ladder}
        return {"incumbent": self._incumbent, **places}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        self._incumbent, self._ladder = state["incumbent"], state["ladder"]
        self._round, self._waiting = state["round"], state["waiting"]

    def _cost(self, config: Mapping[str, Any]) -> float:
        return self.known_costs(self._lowered, [config])[0]

    def _open_round(self) -> None:
        """One candidate a dimension: the dearest of its moves that takes away a step of cost."""
        assert self._incumbent is not None
        target = self._cost(self._incumbent) * (1 - self._reduction)
        found: dict[str, dict[str, Any]] = {}
        for index in range(len(self.space)):
            options = moves(self.space, self._incumbent, index)
            cheaper = [option for option in options if self._cost(option) < self._cost(self._incumbent)]
            # Where no move takes away so much, the largest does: late dimensions are not left out.
            enough = [option for option in cheaper if self._cost(option) <= target]
            if cheaper:
                move = max(enough, key=self._cost) if enough else min(cheaper, key=self._cost)
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

    def _neighbour(self, config: Mapping[str, Any]) -> dict[str, Any]:
        options = moves(self.space, config, int(self.rng.integers(len(self.space))))
        return options[int(self.rng.integers(len(options)))] if options else self.space.sample(self.rng)
