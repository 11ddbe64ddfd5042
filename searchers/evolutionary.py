"""Evolution over several objectives, one child at a time, with exact costs and a cheap surrogate.

Survival and parents follow NSGA-II (Deb et al. 2002) or NSGA-III (Deb and Jain 2014): constrained
non-dominated rank, then how evenly the front is covered. With `aging` the oldest leave instead, as
in regularized evolution (Real et al. 2019, arXiv 1802.01548). Ours is that a batch of children is
bred for each suggestion and screened: known costs enter exactly, a surrogate predicts the rest, and
the child that promises the most hypervolume is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal
from ray_nascomp.observations import Observation
from ray_nascomp.searchers import survival as survivals
from ray_nascomp.searchers.base import CostFunction, GoalSearcher
from ray_nascomp.searchers.operators import Variation
from ray_nascomp.searchers.screening import Screen
from ray_nascomp.searchers.surrogate import NeighbourSurrogate

_CHILDREN = 24
_COST_SPREAD = 0.25
_CROSSOVER = 0.6
# The population lies among the newest: what is older says little about its children.
_LEARNT = 400


class EvolutionarySearch(GoalSearcher):
    """Steady-state multi-objective evolution.

    Args:
        goal: See `GoalSearcher`.
        cost_model: See `GoalSearcher`.
        population_size: Number of results that parents are taken from, 4 or more.
        initial: Number of random configs before the first child, 2 or more. With a cost model
            they are spread over the range of costs.
        survival: "nsga2", by crowding distance, or "nsga3", by reference directions, for four
            objectives and more; it needs the extra `ray-nascomp[nsga3]`.
        aging: Whether the oldest result leaves the population rather than the worst.
        screening: Whether children are screened by predicted hypervolume before one is tried.
        role_aware: Whether variation looks at what a dimension decides.
        seed: See `GoalSearcher`.
        points_to_evaluate: See `GoalSearcher`.
        warm_start: See `GoalSearcher`.

    Raises:
        ConfigError: If an argument is not allowed, or pymoo is not installed.
    """

    def __init__(
        self,
        goal: Goal,
        cost_model: CostFunction | None = None,
        *,
        population_size: int = 32,
        initial: int = 10,
        survival: Literal["nsga2", "nsga3"] = "nsga2",
        aging: bool = False,
        screening: bool = True,
        role_aware: bool = True,
        seed: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        warm_start: Iterable[Observation] | str | Path | Any = None,
    ) -> None:
        if population_size < 4:
            raise ConfigError(f"population_size: {population_size!r} was given, 4 or more is allowed")
        if initial < 2:
            raise ConfigError(f"initial: {initial!r} was given, 2 or more is allowed")
        if survival not in ("nsga2", "nsga3"):
            raise ConfigError.unknown("survival", survival, ("nsga2", "nsga3"))
        if survival == "nsga3" and find_spec("pymoo") is None:
            raise ConfigError("survival='nsga3': pymoo is not installed; pip install 'ray-nascomp[nsga3]'")
        super().__init__(goal, cost_model, seed=seed, points_to_evaluate=points_to_evaluate, warm_start=warm_start)
        self._population_size = population_size
        self._initial = initial
        self._survival = survival
        self._aging = aging
        self._screening = screening
        self._role_aware = role_aware
        self._parents: np.ndarray | None = None
        self._brood = _CHILDREN
        self._surrogate: NeighbourSurrogate | None = None
        self._learnt: list[Mapping[str, Any]] = []
        self._screen: tuple[Screen, list[str]] | None = None

    @cached_property
    def variation(self) -> Variation:
        """The operators of the space."""
        return Variation(self.space.dimensions, self._role_aware)

    def propose(self) -> dict[str, Any]:
        """A random config at first, then the most promising of a batch of children."""
        finals = self.final_positions()
        if len(finals) < 4 or len(self.observations) + len(self._pending) < self._initial:
            return self.spread()
        parents = self._population()
        if not self._screening:
            return self._children(parents, 1)[0]
        children = self._children(parents, self._brood)
        self.foresee(children)
        children = [c for c in children if self.is_new(c) and self.known_metrics(c) is not None]
        if not children:
            return self.space.sample(self.rng)
        return self._most_promising(children)

    def predict(self, configs: Sequence[Mapping[str, Any]], unknown: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What is expected of configs.

        Args:
            configs: Configs, canonical and affordable.
            unknown: The goal's metrics that the cost model does not know.

        Returns:
            Means and standard deviations, each of shape `(configs, unknown)`.
        """
        if self._surrogate is None:
            finals = self.final_positions()
            targets = self.metric_table(finals)[:, [self.goal.metrics.index(metric) for metric in unknown]]
            usable = np.flatnonzero(np.isfinite(targets).all(axis=1))[-_LEARNT:]
            self._learnt = [self.observations[finals[row]].config for row in usable]
            self._surrogate = NeighbourSurrogate(self._inputs([]), targets[usable])
        return self._surrogate.predict(self._inputs(configs)[len(self._learnt) :])

    def _inputs(self, configs: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """What the surrogate sees: of the configs it learns from, then of others."""
        every = [*self._learnt, *configs]
        features = self.space.features(self.space.encode(every))
        costs = self.known_features(every, scaled_by=len(self._learnt))
        return np.concatenate([features, 0.5 + _COST_SPREAD * costs], axis=1)

    def observed(self, observation: Observation, reports: Mapping[int, Mapping[str, Any]]) -> None:
        """The population and the surrogate have something new to learn."""
        self._parents = None
        self._surrogate = None
        self._screen = None

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The population and the surrogate follow from the observations."""
        self._parents = None
        self._surrogate = None
        self._screen = None

    def _population(self) -> np.ndarray:
        """Encoded configs of the population, best first, shape `(parents, dimensions)`."""
        if self._parents is None:
            finals = self.final_positions()
            if self._aging:
                finals = finals[-self._population_size :]
            encoded, losses, violations = self.table(finals)
            chosen = getattr(survivals, self._survival)(losses, violations, self._population_size)
            self._parents = encoded[chosen]
        return self._parents

    def _children(self, parents: np.ndarray, count: int) -> list[dict[str, Any]]:
        """Children of the population, some of one parent and some of two."""
        # Parents are sorted: the better of two is the one that stands first.
        first, second = self.rng.integers(len(parents), size=(2, count, 2)).min(axis=2)
        crossed = self.variation.crossover(self.rng, parents[first], parents[second])
        drafts = np.where(self.rng.random((count, 1)) < _CROSSOVER, crossed, parents[first])
        return self.space.decode_many(self.variation.mutate(self.rng, drafts))

    def _most_promising(self, children: list[dict[str, Any]]) -> dict[str, Any]:
        """The child with the largest predicted gain in hypervolume, one sample of each prediction."""
        screen, unknown = self._target()
        mean, deviation = self.predict(children, unknown)
        drawn = mean + deviation * self.rng.standard_normal(mean.shape)
        metrics = [
            {**dict(zip(unknown, row, strict=True)), **(self.known_metrics(child) or {})}
            for row, child in zip(drawn.tolist(), children, strict=True)
        ]
        losses = np.array([self.goal.losses(row) for row in metrics])
        violations = np.array([self.goal.violation(row) for row in metrics])
        return children[int(np.argmax(screen.gains(losses, violations)))]

    def _target(self) -> tuple[Screen, list[str]]:
        """The front so far, and the metrics that the cost model does not know."""
        if self._screen is None:
            finals = self.final_positions()
            _, losses, violations = self.table(finals)
            known = self.known_metrics(self.observations[finals[0]].config) or {}
            unknown = [metric for metric in self.goal.metrics if metric not in known]
            self._screen = Screen(losses, violations), unknown
        return self._screen
