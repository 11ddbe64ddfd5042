"""Evolution over several objectives, one child at a time, with exact costs and a cheap surrogate.

Survival and parents follow NSGA-II (Deb et al. 2002): constrained non-dominated rank, then
crowding distance. With `aging` the oldest leave instead, as in regularized evolution (Real et
al. 2019, arXiv 1802.01548). Ours is that a batch of children is bred for each suggestion and
screened: known costs enter exactly, a surrogate predicts the rest, and the child that promises
the most hypervolume is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import moocore
import numpy as np

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal, as_float
from ray_nascomp.observations import Observation
from ray_nascomp.pareto import hypervolume, ranks
from ray_nascomp.searchers.base import CostFunction, GoalSearcher
from ray_nascomp.searchers.operators import crossover, mutate
from ray_nascomp.searchers.surrogate import NeighbourSurrogate

Generation = tuple[list[Observation], np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_CHILDREN = 16
_INITIAL_DRAWS = 12


class EvolutionarySearch(GoalSearcher):
    """Steady-state multi-objective evolution.

    Args:
        goal: See `GoalSearcher`.
        cost_model: See `GoalSearcher`.
        population_size: Number of results that parents are taken from, 4 or more.
        initial: Number of random configs before the first child, 2 or more. With a cost model
            they are spread over the range of costs.
        aging: Whether the oldest result leaves the population rather than the worst.
        screening: Whether children are screened by predicted hypervolume before one is tried.
        role_aware: Whether variation looks at what a dimension decides.
        seed: See `GoalSearcher`.
        points_to_evaluate: See `GoalSearcher`.
        warm_start: See `GoalSearcher`.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(
        self,
        goal: Goal,
        cost_model: CostFunction | None = None,
        *,
        population_size: int = 32,
        initial: int = 10,
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
        super().__init__(goal, cost_model, seed=seed, points_to_evaluate=points_to_evaluate, warm_start=warm_start)
        self._population_size = population_size
        self._initial = initial
        self._aging = aging
        self._screening = screening
        self._role_aware = role_aware
        self._values: list[list[float]] = []
        self._current: Generation | None = None
        self._surrogate: tuple[NeighbourSurrogate, list[str]] | None = None

    def propose(self) -> dict[str, Any]:
        """A random config at first, then the most promising of a batch of children."""
        finals, encoded, losses, violations, parents = self._generation()
        if len(finals) < 4 or len(self.observations) + len(self._pending) < self._initial:
            return self._spread()
        if not self._screening:
            return self._child(finals, parents)
        children = [self._child(finals, parents) for _ in range(_CHILDREN)]
        self.foresee(children)
        children = [c for c in children if self.is_new(c) and self.known_metrics(c) is not None]
        if not children:
            return self.space.sample(self.rng)
        return self._most_promising(children, finals, encoded, losses, violations)

    def observed(self, observation: Observation, reports: Mapping[int, Mapping[str, Any]]) -> None:
        """The population and the surrogate have something new to learn."""
        self._values.append([as_float(observation.metrics.get(metric)) for metric in self.goal.metrics])
        self._current = None
        self._surrogate = None

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The population and the surrogate follow from the observations."""
        self._values = [[as_float(o.metrics.get(metric)) for metric in self.goal.metrics] for o in self.observations]
        self._current = None
        self._surrogate = None

    def _generation(self) -> Generation:
        """The final observations with their table, and the positions of the population, best first."""
        if self._current is None:
            positions = self.final_positions()
            encoded, losses, violations = self.table(positions)
            finals = [self.observations[i] for i in positions]
            if self._aging:
                first = max(0, len(finals) - self._population_size)
                parents = first + _best(losses[first:], violations[first:], self._population_size)
            else:
                parents = _best(losses, violations, self._population_size)
            self._current = finals, encoded, losses, violations, parents
        return self._current

    def _spread(self) -> dict[str, Any]:
        """A random config, of several the one whose known costs are farthest from all others'."""
        draws = [self.space.sample(self.rng) for _ in range(_INITIAL_DRAWS if self.cost_model else 1)]
        self.foresee(draws)
        draws = [d for d in draws if self.known_metrics(d) is not None] or draws[:1]
        others = [*(o.config for o in self.observations), *self.pending]
        costs = [self._known_losses(config) for config in (*draws, *others)]
        if len(draws) == 1 or not others or not costs[0].size:
            return draws[0]
        table = np.stack(costs)
        span = np.ptp(table, axis=0)
        table = table / np.where(span > 0, span, 1.0)
        distances = np.linalg.norm(table[: len(draws), None] - table[None, len(draws) :], axis=2).min(axis=1)
        return draws[int(np.argmax(distances))]

    def _known_losses(self, config: Mapping[str, Any]) -> np.ndarray:
        known = self.known_metrics(config) or {}
        return np.array([known[o.metric] * o.sign for o in self.goal.objectives if o.metric in known])

    def _child(self, finals: list[Observation], parents: np.ndarray) -> dict[str, Any]:
        # Parents are sorted: the better of two is the one that stands first.
        first, second = self.rng.integers(len(parents), size=(2, 2)).min(axis=1)
        values = self.space.values(finals[parents[first]].config)
        if self.rng.random() < 0.6:
            values = crossover(self.rng, values, self.space.values(finals[parents[second]].config))
        return self.space.to_config(mutate(self.rng, self.space.dimensions, values, self._role_aware))

    def _most_promising(
        self,
        children: list[dict[str, Any]],
        finals: list[Observation],
        encoded: np.ndarray,
        losses: np.ndarray,
        violations: np.ndarray,
    ) -> dict[str, Any]:
        """The child with the largest predicted gain in hypervolume, one sample of each prediction."""
        surrogate, unknown = self._fit(finals, encoded)
        mean, deviation = surrogate.predict(self.space.features(self.space.encode(children)))
        drawn = mean + deviation * self.rng.standard_normal(mean.shape)
        feasible = losses[violations == 0]
        front = feasible[moocore.is_nondominated(feasible)] if len(feasible) else losses[:0]
        every = np.concatenate([losses[np.isfinite(losses).all(axis=1)], front])
        low, high = every.min(axis=0), every.max(axis=0)
        span = np.where(high > low, high - low, 1.0)
        front = (front - low) / span
        reference = np.full(len(low), 1.1)
        base = hypervolume(front, reference)
        best, best_gain = children[0], -np.inf
        for index, child in enumerate(children):
            metrics = {**dict(zip(unknown, drawn[index].tolist(), strict=True)), **(self.known_metrics(child) or {})}
            violation = self.goal.violation(metrics)
            point = (self.goal.losses(metrics) - low) / span
            if violation > 0 or not np.isfinite(point).all():
                gain = -min(violation, 1e6)
            elif (point >= 1.1).any() or (front <= point).all(axis=1).any():
                gain = -1e-9 * float(np.maximum(point, 0).sum())
            else:
                gain = hypervolume(np.vstack([front, point]), reference) - base
            if gain > best_gain:
                best, best_gain = child, gain
        return best

    def _fit(self, finals: list[Observation], encoded: np.ndarray) -> tuple[NeighbourSurrogate, list[str]]:
        """The surrogate of the metrics that the cost model does not know."""
        if self._surrogate is None:
            known = self.known_metrics(finals[0].config) or {}
            unknown = [metric for metric in self.goal.metrics if metric not in known]
            columns = [self.goal.metrics.index(metric) for metric in unknown]
            values = np.array([self._values[i] for i in self.final_positions()])
            targets = values.reshape(len(finals), -1)[:, columns]
            usable = np.isfinite(targets).all(axis=1)
            self._surrogate = NeighbourSurrogate(self.space.features(encoded[usable]), targets[usable]), unknown
        return self._surrogate


def _best(losses: np.ndarray, violations: np.ndarray, count: int) -> np.ndarray:
    """Positions of the best rows by constrained rank, then by crowding distance, best first."""
    rank = ranks(losses, violations)
    chosen: list[int] = []
    for level in np.unique(rank):
        members = np.flatnonzero(rank == level)
        chosen.extend(members[np.argsort(-_crowding_distance(losses[members]), kind="stable")].tolist())
        if len(chosen) >= count:
            break
    return np.array(chosen[:count], dtype=int)


def _crowding_distance(losses: np.ndarray) -> np.ndarray:
    """Sum over objectives of the gap between a row's neighbours, infinite at the ends."""
    distance = np.zeros(len(losses))
    for column in np.nan_to_num(losses, nan=0.0).T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0 and len(order) > 2:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance
