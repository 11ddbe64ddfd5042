"""What all searchers share: Tune's contract, known costs, duplicates, records, state on disk.

A searcher of one's own derives from `GoalSearcher` and writes `propose`. A trial's life, seen
from here: `suggest` gives it a config and makes it pending; `on_trial_result` hears of its
reports; `on_trial_complete` turns it into an `Observation`.
"""

from __future__ import annotations

import json
import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal, as_float, says_infeasible
from ray_nascomp.observation_log import plain
from ray_nascomp.observations import Observation, Status, reported_names
from ray_nascomp.searchers.known_costs import CostFunction, Known, KnownCosts
from ray_nascomp.searchers.ladder import Costs, costs_by_role, dense, rungs
from ray_nascomp.searchers.saved import SavedSearcher
from ray_nascomp.searchers.scaling import SPREAD, UnitScale, tabulated
from ray_nascomp.searchers.state import read_observations
from ray_nascomp.searchers.table import ObservationTable
from ray_nascomp.space import Space

logger = logging.getLogger(__name__)

_TRIES = 64
_RANDOM_TRIES = 2000
_SPREAD_DRAWS = 12
_LADDER = (0.0, 0.5, 0.25, 0.75)


class GoalSearcher(SavedSearcher):
    """A searcher for a goal.

    Args:
        goal: Objectives and constraints; a metric given to `TuneConfig` does not change them.
        cost_model: Function from a config to metrics that need no trial, such as
            `ray_nascomp.CostModel`. It may raise `InfeasibleError`. Configs that break a
            constraint on such a metric are never suggested. If it has a method
            `canonical(config)`, configs with equal canonical values are duplicates.
        seed: Seed of all randomness.
        points_to_evaluate: Configs to try first. Keys that one leaves out are drawn at random.
        warm_start: Earlier observations, anything with a method `observations()` such as
            `Results`, or the path of a state file that `save` has written. Those that do not fit
            the space are passed over.

    Raises:
        ConfigError: If an argument is of the wrong kind.
    """

    def __init__(
        self,
        goal: Goal,
        cost_model: CostFunction | None = None,
        *,
        seed: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        warm_start: Iterable[Observation] | str | Path | Any = None,
    ) -> None:
        super().__init__(metric=None, mode=None)
        if not isinstance(goal, Goal):
            raise ConfigError(f"goal: {goal!r} was given, a ray_nascomp.Goal is allowed")
        if cost_model is not None and not callable(cost_model):
            raise ConfigError(f"cost_model: {cost_model!r} was given, a function config -> metrics is allowed")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
            raise ConfigError(f"seed: {seed!r} was given, a whole number of 0 or more, or None, is allowed")
        if points_to_evaluate is not None and (
            isinstance(points_to_evaluate, Mapping)
            or not all(isinstance(point, Mapping) for point in points_to_evaluate)
        ):
            raise ConfigError(f"points_to_evaluate: {points_to_evaluate!r} was given, a list of configs is allowed")
        self.goal = goal
        self.cost_model = cost_model
        self.rng = np.random.default_rng(seed)
        self.observations: list[Observation] = []
        self._table: ObservationTable | None = None
        self._space: Space | None = None
        self._points = [dict(point) for point in points_to_evaluate or []]
        self._lost: list[dict[str, Any]] = []
        self._held: dict[str, Any] | None = None
        self._pending: dict[str, dict[str, Any]] = {}
        self._reports: dict[str, dict[int, dict[str, Any]]] = {}
        self._keys: set[str] = set()
        self._known = KnownCosts(cost_model, goal.constraints)
        self._warm_start = read_observations(warm_start)
        self._ladder: list[dict[str, Any]] | None = None
        self._has_warned = False

    @abstractmethod
    def propose(self) -> dict[str, Any]:
        """The next config, canonical; a duplicate or an unaffordable one is refused and asked again."""

    @property
    def space(self) -> Space:
        """The space that is searched.

        Raises:
            RuntimeError: Before Tune has said what it is.
        """
        if self._space is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know the search space yet: give it to "
                "tune.Tuner(..., param_space=...) or call set_search_properties"
            )
        return self._space

    @property
    def pending(self) -> list[dict[str, Any]]:
        """Configs of the trials that run."""
        return list(self._pending.values())

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Takes over Tune's `param_space`; the goal stays what it is.

        Raises:
            ConfigError: If the space cannot be searched, or the cost model refuses its configs.
        """
        if self._space is not None:
            return False
        self._space = Space(config)
        # A wrong name in the space is the user's to know before a trial is spent.
        self.known_metrics(self._space.sample(np.random.default_rng(0)))
        for observation in self._warm_start:
            try:
                config = self._space.canonical(observation.config)
            except ConfigError:
                continue
            self._record(Observation(**{**vars(observation), "config": config}))
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray's leaves FINISHED out.
        """A config that is neither known nor pending, or `Searcher.FINISHED` if there is none left."""
        config = self._next_lost() or self._next_of_its_own()
        if config is None:
            logger.warning(
                "%s ends after %d trials: no other config is new and within the constraints on known costs",
                type(self).__name__,
                len(self.observations),
            )
            return Searcher.FINISHED
        self._pending[trial_id] = config
        self._keys.add(self.key(config))
        return config

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Remembers what a running trial reports."""
        if trial_id in self._pending:
            self._reports.setdefault(trial_id, {})[_iteration(result)] = self._relevant(result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Turns the trial into an observation."""
        config = self._pending.pop(trial_id, None)
        reports = self._reports.pop(trial_id, {})
        if config is None:
            return
        if result is not None:
            reports[_iteration(result)] = self._relevant(result)
            if not error:
                self._warn_of_unreported(result, reports.values())
        last = max(reports, default=0)
        metrics = reports.get(last, {})
        if not error and says_infeasible(metrics):
            status = Status.INFEASIBLE
        elif error or not np.isfinite(self.goal.losses(metrics)).all():
            status = Status.FAILED
        elif result is None or metrics.get("final") is False:
            status = Status.STOPPED
        else:
            status = Status.COMPLETED
        self._record(Observation(trial_id, config, metrics, status, last), reports)

    def key(self, config: Mapping[str, Any]) -> str:
        """A text that configs with the same meaning share."""
        canonical = getattr(self.cost_model, "canonical", None)
        if canonical is None:
            return self.space.key(config)
        return json.dumps(canonical(self.space.canonical(config)), sort_keys=True, default=str)

    def is_new(self, config: Mapping[str, Any]) -> bool:
        """Whether no trial has, or had, a config of the same meaning."""
        return self.key(config) not in self._keys

    def known_metrics(self, config: Mapping[str, Any]) -> Known:
        """What the cost model knows of a config; None if that rules it out."""
        return self.foresee([config])[0]

    def foresee(self, configs: Sequence[Mapping[str, Any]]) -> list[Known]:
        """`known_metrics` of several configs, asked for at once where the cost model has a method `many`."""
        return self._known.of(self.space, configs)

    def opening(self) -> dict[str, Any] | None:
        """The next of a few configs that are compressed alike everywhere, from dense down; None if all were tried.

        What is cheaper the cost model tells, or, without one, what the dimensions decide.
        """
        if self._ladder is None:
            costs = self._costs_of_goal() or costs_by_role(self.space)
            top = dense(self.space, costs)
            self._ladder = [] if top is None else rungs(self.space, costs, top, _LADDER)
        return next((config for config in self._ladder if self.is_new(config)), None)

    def spread(self) -> dict[str, Any]:
        """The `opening`, then random configs, of several the one whose known costs are farthest from all others'."""
        opening = self.opening()
        if opening is not None:
            return opening
        draws = [self.space.sample(self.rng) for _ in range(_SPREAD_DRAWS if self.cost_model else 1)]
        draws = [d for d, known in zip(draws, self.foresee(draws), strict=True) if known is not None] or draws[:1]
        others = [*(o.config for o in self.observations), *self.pending]
        costs = [self._known_losses(config) for config in (*draws, *others)]
        if len(draws) == 1 or not others or not costs[0].size:
            return draws[0]
        table = np.stack(costs)
        span = np.ptp(table, axis=0)
        table = table / np.where(span > 0, span, 1.0)
        distances = np.linalg.norm(table[: len(draws), None] - table[None, len(draws) :], axis=2).min(axis=1)
        return draws[int(np.argmax(distances))]

    def _costs_of_goal(self) -> Costs | None:
        """The first objective that is known and has to fall."""
        known = self.known_metrics(self.space.sample(np.random.default_rng(0))) or {}
        metric = next((o.metric for o in self.goal.objectives if o.mode == "min" and o.metric in known), None)
        return None if metric is None else partial(self.known_costs, metric)

    def known_costs(self, metric: str, configs: Sequence[Mapping[str, Any]]) -> list[float]:
        """A known metric of configs, infinite for those that cannot be carried out.

        Raises:
            ConfigError: If the cost model does not know the metric.
        """
        rows = self.foresee(configs)
        for row in rows:
            if row is not None and metric not in row:
                raise ConfigError.unknown("metric", metric, sorted(row))
        return [math.inf if row is None else row[metric] for row in rows]

    def _known_losses(self, config: Mapping[str, Any]) -> np.ndarray:
        known = self.known_metrics(config) or {}
        return np.array([known[o.metric] * o.sign for o in self.goal.objectives if o.metric in known])

    def known_values(self, configs: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """All that the cost model knows of configs, as inputs of a model; see `scaling.tabulated`."""
        return tabulated(self.foresee(configs))

    def known_features(self, configs: Sequence[Mapping[str, Any]], scaled_by: int) -> np.ndarray:
        """`known_values`, each column standardised by the first `scaled_by` of the configs, one or more."""
        table = self.known_values(configs)
        return (UnitScale(table[:scaled_by])(table) - 0.5) / SPREAD

    def final_positions(self) -> list[int]:
        """Positions of the observations whose metrics are final: completed, of the highest fidelity reached.

        A trainable that does not say which report is its last (`final`) ends for Tune alike
        whether it is through or was stopped early; its length tells.
        """
        return [] if self._table is None else self._table.final.tolist()

    def final_observations(self) -> list[Observation]:
        """The observations at `final_positions`."""
        return [self.observations[i] for i in self.final_positions()]

    def table(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observations as arrays.

        Args:
            positions: Positions among `observations`, n of them.

        Returns:
            Encoded configs `(n, dimensions)`, losses `(n, objectives)` and violations `(n,)`.
        """
        table = self._table or self._empty_table()
        chosen = np.asarray(positions, dtype=int)
        return table.encoded[chosen], table.losses[chosen], table.violations[chosen]

    def metric_table(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The goal's metrics of observations, NaN where one is missing, shape `(n, metrics)`."""
        table = self._table or self._empty_table()
        return np.asarray(table.metrics[np.asarray(positions, dtype=int)])

    def known_table(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """`known_values` of observations, shape `(n, known)`."""
        table = self._table or self._empty_table()
        return np.asarray(table.known[np.asarray(positions, dtype=int)])

    def _next_of_its_own(self) -> dict[str, Any] | None:
        held, self._held = self._held, None
        if held is not None and self.is_new(held):
            return held
        return self._next_point() or self._next_proposal()

    def _next_point(self) -> dict[str, Any] | None:
        while self._points:
            point = self._points.pop(0)
            config = self.space.canonical(_merge(self.space.sample(self.rng), point))
            if self.is_new(config) and self.known_metrics(config) is not None:
                return config
        return None

    def _next_proposal(self) -> dict[str, Any] | None:
        for _ in range(_TRIES):
            config = self.propose()
            if self.is_new(config) and self.known_metrics(config) is not None:
                return config
        for _ in range(_RANDOM_TRIES):
            config = self.space.sample(self.rng)
            if self.is_new(config) and self.known_metrics(config) is not None:
                return config
        return None

    def _record(self, observation: Observation, reports: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        self.observations.append(observation)
        self._table = self._table or self._empty_table()
        self._add_row(observation)
        self._keys.add(self.key(observation.config))
        self.observed(observation, reports or {observation.fidelity: observation.metrics})

    def _empty_table(self) -> ObservationTable:
        return ObservationTable(len(self.space), len(self.goal.metrics), len(self.goal.objectives))

    def _add_row(self, observation: Observation) -> None:
        assert self._table is not None
        metrics = observation.metrics
        self._table.append(
            self.space.encode([observation.config])[0],
            np.array([as_float(metrics.get(name)) for name in self.goal.metrics]),
            self.goal.losses(metrics),
            self.goal.violation(metrics),
            observation.fidelity,
            observation.status is Status.COMPLETED,
            metrics.get("final") is True,
            self.known_values([observation.config])[0],
        )

    def observed(self, observation: Observation, reports: Mapping[int, Mapping[str, Any]]) -> None:
        """Called once for every observation, with the trial's reports by training iteration."""

    def _warn_of_unreported(self, result: Mapping[str, Any], reports: Iterable[Mapping[str, Any]]) -> None:
        """Says once, and not at the end, that a trainable of one's own reports nothing under a metric's name."""
        missing = [name for name in self.goal.metrics if not any(name in report for report in reports)]
        if self._has_warned or not missing or says_infeasible(result):
            return
        self._has_warned = True
        logger.warning(
            "the goal looks at %s, which a trial has not reported: it counts as failed, and so will all that report "
            "the same: %s",
            ", ".join(map(repr, missing)),
            reported_names(result),
        )

    def _relevant(self, result: Mapping[str, Any]) -> dict[str, Any]:
        wanted = (*self.goal.metrics, "feasible", "final", "reason")
        return {name: _scalar(result[name]) for name in wanted if name in result}


def _iteration(result: Mapping[str, Any]) -> int:
    value = result.get("training_iteration", 1)
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 1


def _scalar(value: Any) -> Any:
    """JSON's own types, which a restored searcher would have."""
    return value if isinstance(value, (bool, int, float, str, type(None))) else plain(value)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(inner, dict)
        merged[key] = _merge(inner, value) if nested else value  # type: ignore[arg-type]
    return merged
