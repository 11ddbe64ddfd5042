"""Evolution over several objectives, one child at a time, with exact costs and a cheap surrogate.

Survival and parents follow NSGA-II (Deb et al. 2002) or NSGA-III (Deb and Jain 2014): constrained
non-dominated rank, then how evenly the front is covered. With `aging` the oldest leave instead, as
in regularized evolution (Real et al. 2019, arXiv 1802.01548). Ours is that a batch of children is
bred for each suggestion and screened: known costs enter exactly, a surrogate predicts the rest, and
the child that promises the most hypervolume is tried, after a few rounds in which the most
promising have children of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal, as_float
from ray_nascomp.observations import Observation
from ray_nascomp.searchers import survival as survivals
from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.known_costs import CostFunction
from ray_nascomp.searchers.operators import Variation
from ray_nascomp.searchers.process import ProcessSurrogate, Shape
from ray_nascomp.searchers.process_shape import choose_shapes
from ray_nascomp.searchers.scaling import UnitScale, tabulated
from ray_nascomp.searchers.screening import Screen, judged
from ray_nascomp.space import Role

logger = logging.getLogger(__name__)

_CHILDREN = 16
# Rounds in which the most promising have children, at most: how many is drawn, so that not all are spent
# on what the surrogate holds for best.
_CLIMBS = 3
_CLIMBERS = 3
# Beyond, trials are cheap, and a suggestion should be.
_MANY = 500
_CROSSOVER = 0.6
_DRAWS = 8
# The population lies among the newest: what is older says little about its children.
_LEARNT = 200
_REFITS = 64


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
        late_moves: Share of the children, from 0 up to but not 1, that have other bits than their parent and
            nothing else: with a stage cache they take all training before the integers from there.
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
        late_moves: float = 0.0,
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
        if not 0 <= as_float(late_moves) < 1:
            raise ConfigError(f"late_moves: {late_moves!r} was given, a share from 0 up to but not 1 is allowed")
        if survival == "nsga3" and find_spec("pymoo") is None:
            raise ConfigError("survival='nsga3': pymoo is not installed; pip install 'ray-nascomp[nsga3]'")
        super().__init__(goal, cost_model, seed=seed, points_to_evaluate=points_to_evaluate, warm_start=warm_start)
        self._population_size = population_size
        self._initial = initial
        self._survival = survival
        self._aging = aging
        self._screening = screening
        self._role_aware = role_aware
        self._late_moves = late_moves
        self._parents: np.ndarray | None = None
        self._brood = _CHILDREN
        self._surrogate: tuple[int, ProcessSurrogate, UnitScale] | None = None
        self._shapes: tuple[int, list[Shape]] | None = None
        self._screen: tuple[Screen, list[str]] | None = None

    @cached_property
    def variation(self) -> Variation:
        """The operators of the space."""
        if self._late_moves and not any(d.role is Role.BITS for d in self.space.dimensions):
            logger.warning("late_moves: %r was given, but the space offers no choice of bits", self._late_moves)
        return Variation(self.space.dimensions, self._role_aware)

    def propose(self) -> dict[str, Any]:
        """A random config at first, then the most promising of a batch of children."""
        finals = self.final_positions()
        if len(finals) < 4 or len(self.observations) + len(self._pending) < self._initial:
            return self.spread()
        parents = self._population()
        if self._late_moves and self.rng.random() < self._late_moves and (late := self._late_child(parents)):
            return late
        if not self._screening:
            return self._children(parents, 1)[0]
        judged = self._judged(self._children(parents, self._brood))
        for _ in range(int(self.rng.integers(_CLIMBS + 1)) if len(finals) < _MANY else 0):
            judged = sorted(judged, key=lambda pair: -pair[0])
            if climbers := self.space.encode([config for _, config in judged[:_CLIMBERS]]).tolist():
                chosen = np.array(climbers)[self.rng.integers(len(climbers), size=_CHILDREN)]
                judged += self._judged(self.space.decode_many(self.variation.mutate(self.rng, chosen)))
        best_first = sorted(judged, key=lambda pair: -pair[0])
        return next((config for _, config in best_first if self.is_new(config)), None) or self.space.sample(self.rng)

    def imagine(
        self,
        configs: Sequence[Mapping[str, Any]],
        known: Sequence[Mapping[str, float]],
        unknown: Sequence[str],
        draws: int,
    ) -> np.ndarray:
        """What configs may turn out to be.

        Args:
            configs: Configs, canonical and affordable.
            known: What the cost model knows of each.
            unknown: The goal's metrics that it does not know.
            draws: How many draws of each.

        Returns:
            Shape `(draws, configs, unknown)`.
        """
        surrogate, scale = self._fit([self.goal.metrics.index(metric) for metric in unknown])
        features = self.space.features(self.space.encode(configs))
        return surrogate.quantiles(self.rng, np.concatenate([features, scale(tabulated(known))], axis=1), draws)

    def _fit(self, columns: list[int]) -> tuple[ProcessSurrogate, UnitScale]:
        """The surrogate of some metrics; it follows from the observations alone, whenever it is fitted."""
        finals = np.array(self.final_positions())
        targets = self.metric_table(finals)[:, columns]
        usable = np.flatnonzero(np.isfinite(targets).all(axis=1))
        # A long search need not look at its last few results to know what children are like.
        usable = usable[: len(usable) - len(usable) % max(1, len(usable) // _REFITS)]
        chosen_at = _milestone(len(usable))
        # Results that turn out not to be final, once longer ones come in, change the count as well.
        if self._surrogate is None or self._surrogate[0] != len(usable):
            if self._shapes is None or self._shapes[0] != chosen_at:
                first = usable[:chosen_at][-_LEARNT:]
                self._shapes = chosen_at, choose_shapes(self._inputs(finals[first])[0], targets[first])
            fitted, usable = len(usable), usable[-_LEARNT:]
            inputs, scale = self._inputs(finals[usable])
            self._surrogate = fitted, ProcessSurrogate(inputs, targets[usable], self._shapes[1]), scale
        return self._surrogate[1:]

    def _inputs(self, positions: np.ndarray) -> tuple[np.ndarray, UnitScale]:
        """What the surrogate sees of observations, and the scale of known costs in it."""
        known = self.known_table(positions)
        scale = UnitScale(known)
        features = self.space.features(self.table(positions)[0])
        return np.concatenate([features, scale(known)], axis=1), scale

    def observed(self, observation: Observation, reports: Mapping[int, Mapping[str, Any]]) -> None:
        """The population has something new to learn."""
        self._parents = None
        self._screen = None

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The population and the surrogate follow from the observations."""
        self._shapes = None
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

    def _late_child(self, parents: np.ndarray) -> dict[str, Any] | None:
        """The most promising of the new configs that differ from one of the population in bits alone."""
        drafts = parents[self.rng.integers(len(parents), size=(2, self._brood)).min(axis=0)]
        children = [c for c in self.space.decode_many(self.variation.requantize(self.rng, drafts)) if self.is_new(c)]
        if not children or not self._screening:
            return children[0] if children else None
        judged = self._judged(children)
        return max(judged, key=lambda pair: pair[0])[1] if judged else None

    def _judged(self, children: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
        """The affordable ones, each with its expected gain in hypervolume over what is unknown."""
        foreseen = zip(children, self.foresee(children), strict=True)
        affordable = [(child, known) for child, known in foreseen if known is not None]
        if not affordable:
            return []
        children, known = [child for child, _ in affordable], [known for _, known in affordable]
        screen, unknown = self._target()
        imagined = self.imagine(children, known, unknown, _DRAWS)
        table = np.empty((_DRAWS, len(children), len(self.goal.metrics)))
        for column, metric in enumerate(self.goal.metrics):
            if metric in unknown:
                table[:, :, column] = imagined[:, :, unknown.index(metric)]
            else:
                table[:, :, column] = [metrics[metric] for metrics in known]
        gains = screen.gains(*judged(self.goal, table.reshape(-1, table.shape[2])))
        return list(zip(gains.reshape(_DRAWS, -1).mean(axis=0).tolist(), children, strict=True))

    def _target(self) -> tuple[Screen, list[str]]:
        """The front so far, and the metrics that the cost model does not know."""
        if self._screen is None:
            finals = self.final_positions()
            _, losses, violations = self.table(finals)
            known = self.known_metrics(self.observations[finals[0]].config) or {}
            unknown = [metric for metric in self.goal.metrics if metric not in known]
            self._screen = Screen(losses, violations), unknown
        return self._screen


def _milestone(count: int) -> int:
    """The last of the numbers 4, 5, 6, 8, 10, ... that has been reached, each a quarter more than the one before."""
    reached = min(count, 4)
    while reached + max(1, reached // 4) <= count:
        reached += max(1, reached // 4)
    return reached
