"""Asynchronous successive halving over several objectives with constraints.

The scheme is ASHA's (Li et al. 2020, arXiv 1810.05934) with the multi-objective order of
Schmucker et al. 2021 (arXiv 2106.12639): a trial that reaches a rung goes on if it is among the
best share of those that have reached it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ray_nascomp.errors import ConfigError, InfeasibleError
from ray_nascomp.goals import Goal, as_float, says_infeasible
from ray_nascomp.observations import reported_names
from ray_nascomp.schedulers.past import past_results
from ray_nascomp.schedulers.progress import Progress
from ray_nascomp.schedulers.rungs import most_promising

CostFunction = Callable[[Mapping[str, Any]], Mapping[str, float]]

_GRACE_PERIOD = 2
"""From benchmarks/schedules.py: what is seen before training misleads; a later first rung only costs epochs."""

_TOLERATED = 0.9
"""From the same: with a stricter bar what is compressed most never gets the epochs in which it recovers."""


_MOVES = 0.01
"""A constrained metric that has changed by a larger share within a trial is one that training changes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """A trial's result at a rung: its losses, its violation, and the part of each constraint in it."""

    losses: list[float]
    violation: float
    parts: list[float]


class ParetoASHAScheduler(FIFOScheduler):
    """Stops trials that are not among the most promising at a rung.

    A feasible trial is never stopped while no other feasible one runs or has run in full. Of those
    that violate a constraint at a rung, all but the worst tenth count as feasible for now, unless
    training does not change what they violate: such as bytes, in all reports of a trial the same.
    Results that lack a metric, or have NaN, rank last. After `Tuner.restore` the rungs are
    rebuilt from what the trials have reported.

    Args:
        goal: Objectives and constraints. A metric given to `TuneConfig` does not change them.
        max_t: Value of `time_attr` at which a trial has run in full; it ends there.
        grace_period: Value of `time_attr` at the first rung; 2 unless told, or `max_t` if that is
            less: what compressed networks report before training says little about their end (see
            the guide to schedulers).
        reduction_factor: Of so many trials at a rung one goes on, above 1; rungs lie this
            factor apart.
        time_attr: Reported measure of progress.
        cost_model: Function from a config to metrics that need no trial, such as
            `ray_nascomp.CostModel`. They stand in for what a trial has not reported yet, and a
            trial whose known costs break a constraint ends at its first report. It may raise
            `InfeasibleError`.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(
        self,
        goal: Goal,
        max_t: float = 100,
        grace_period: float | None = None,
        reduction_factor: float = 3,
        time_attr: str = "training_iteration",
        cost_model: CostFunction | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(goal, Goal):
            raise ConfigError(f"goal: {goal!r} was given, a ray_nascomp.Goal is allowed")
        if not as_float(max_t) > 0:
            raise ConfigError(f"max_t: {max_t!r} was given, a positive number is allowed")
        if grace_period is None:
            grace_period = min(_GRACE_PERIOD, max_t)
        if not 0 < as_float(grace_period) <= max_t:
            raise ConfigError(f"grace_period: {grace_period!r} was given, more than 0 and up to max_t={max_t!r}")
        if not as_float(reduction_factor) > 1:
            raise ConfigError(f"reduction_factor: {reduction_factor!r} was given, a number above 1 is allowed")
        if cost_model is not None and not callable(cost_model):
            raise ConfigError(f"cost_model: {cost_model!r} was given, a function config -> metrics is allowed")
        self.goal = goal
        self._cost_model = cost_model
        self._max_t = max_t
        self._reduction_factor = reduction_factor
        self._progress = Progress(time_attr)
        count = math.ceil(math.log(max_t / grace_period, reduction_factor) - 1e-9)
        self._milestones = [grace_period * reduction_factor**level for level in range(count)]
        self._rungs: dict[float, dict[str, _Entry]] = {m: {} for m in self._milestones}
        self._stopped: set[str] = set()
        # Trials that run or have run in full, and whose last report is feasible.
        self._feasible: set[str] = set()
        self._costs: dict[str, Mapping[str, float]] = {}
        # Each constraint's metric in a trial's first report, and which of them have changed, and stayed, since.
        self._first: dict[str, np.ndarray] = {}
        self._moved = np.zeros(len(goal.constraints), dtype=bool)
        self._stayed = np.zeros(len(goal.constraints), dtype=bool)
        self._has_warned = False

    @property
    def metric(self) -> None:
        """No single metric: the goal has several."""
        return None

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accepts whatever `TuneConfig` says; the goal decides."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Takes up what a trial of a restored experiment has reported."""
        results = [self._with_costs(trial, result) for result in past_results(trial)]
        for result in results:
            self._record(trial.trial_id, result)
        if not results:
            return
        status = getattr(trial, "status", Trial.PENDING)
        if status == Trial.TERMINATED and self._was_stopped(trial.trial_id, results):
            self._stopped.add(trial.trial_id)
        elif status != Trial.ERROR:
            self._note_feasibility(trial.trial_id, results[-1])

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decides at a rung whether the trial goes on."""
        known = self._with_costs(trial, result)
        self._note_feasibility(trial.trial_id, known)
        if self._progress.of(result) >= self._max_t:
            return TrialScheduler.STOP
        if self._is_out_of_reach(trial.trial_id, known):
            return self._stop(trial.trial_id)
        milestone = self._record(trial.trial_id, known)
        if milestone is None or self._is_promising(trial.trial_id, milestone):
            return TrialScheduler.CONTINUE
        return self._stop(trial.trial_id)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Enters the last report of a trial that has ended by itself, for the others' sake."""
        known = self._with_costs(trial, result)
        self._record(trial.trial_id, known)
        if trial.trial_id not in self._stopped:
            self._note_feasibility(trial.trial_id, known)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Counts no longer on a trial that has failed, unless it is tried again and reports."""
        self._feasible.discard(trial.trial_id)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Counts no longer on a trial that will not run."""
        self._feasible.discard(trial.trial_id)

    def debug_string(self) -> str:
        """How many trials each rung has seen, for Tune's status."""
        rungs = ", ".join(f"{milestone:g}: {len(rung)}" for milestone, rung in self._rungs.items())
        return f"ParetoASHA: {len(self._stopped)} trials stopped; trials seen at each rung: {rungs}"

    def _stop(self, trial_id: str) -> str:
        self._stopped.add(trial_id)
        self._feasible.discard(trial_id)
        return TrialScheduler.STOP

    def _record(self, trial_id: str, result: Mapping[str, Any]) -> float | None:
        """Enters a result into the highest rung it has reached; returns that rung if it is new to it."""
        self._note_moves(trial_id, result)
        milestone = self._milestone(self._progress.of(result))
        if milestone is None or trial_id in self._rungs[milestone]:
            return None
        self._warn_of_unreported(result)
        parts = [c.violation(as_float(result.get(c.metric))) for c in self.goal.constraints]
        losses, violation = self.goal.losses(result).tolist(), self.goal.violation(result)
        self._rungs[milestone][trial_id] = _Entry(losses, violation, parts)
        return milestone

    def _milestone(self, time: float) -> float | None:
        return max((milestone for milestone in self._milestones if milestone <= time), default=None)

    def _note_moves(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Learns which constrained metrics change while a trial trains."""
        values = np.array([as_float(result.get(c.metric)) for c in self.goal.constraints])
        if trial_id not in self._first:
            self._first[trial_id] = values
            return
        first = self._first[trial_id]
        change = np.abs(values - first)
        moves = change > _MOVES * np.maximum(np.abs(values), np.abs(first))
        self._moved |= moves
        self._stayed |= np.isfinite(change) & ~moves

    def _warn_of_unreported(self, result: Mapping[str, Any]) -> None:
        missing = [name for name in self.goal.metrics if name not in result]
        if self._has_warned or not missing or says_infeasible(result):
            return
        self._has_warned = True
        logger.warning(
            "the goal looks at %s, which a trial has not reported when it came to a rung: it ranks last, and so do all "
            "that report the same: %s",
            ", ".join(map(repr, missing)),
            reported_names(result),
        )

    def _is_promising(self, trial_id: str, milestone: float) -> bool:
        rung = self._rungs[milestone]
        losses = np.array([entry.losses for entry in rung.values()], dtype=float)
        violations = np.array([entry.violation for entry in rung.values()])
        feasible = (violations == 0) & ~np.isnan(losses).any(axis=1)
        position = list(rung).index(trial_id)
        if self._feasible == {trial_id} or (feasible[position] and feasible.sum() == 1):
            return True
        parts = np.array([entry.parts for entry in rung.values()])
        lasting = parts @ (self._stayed & ~self._moved)
        going_on = math.ceil(len(rung) / self._reduction_factor)
        return position in most_promising(losses, violations, _TOLERATED, lasting)[:going_on]

    def _note_feasibility(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if self.goal.is_feasible(result):
            self._feasible.add(trial_id)
        else:
            self._feasible.discard(trial_id)

    def _was_stopped(self, trial_id: str, results: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a trial that has ended was ended here: at its first report at a rung, or for its costs."""
        if results[-1].get("final") is True:
            return False
        times = [self._progress.of(result) for result in results]
        if times[-1] >= self._max_t:
            return False
        milestone = self._milestone(times[-1])
        is_new_there = milestone is not None and not any(milestone <= time < times[-1] for time in times)
        return is_new_there or self._is_out_of_reach(trial_id, results[-1])

    def _is_out_of_reach(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether a known cost breaks a constraint, and what the trial has measured of it does not say otherwise."""
        costs = self._costs.get(trial_id, {})
        return any(
            constraint.violation(as_float(costs.get(constraint.metric))) > 0
            and constraint.violation(as_float(result.get(constraint.metric))) > 0
            for constraint in self.goal.constraints
        )

    def _with_costs(self, trial: Trial, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """The result, and the known costs where it lacks them."""
        if self._cost_model is None:
            return result
        if trial.trial_id not in self._costs:
            try:
                self._costs[trial.trial_id] = dict(self._cost_model(trial.config))
            except InfeasibleError:
                self._costs[trial.trial_id] = {}  # The trial itself says why.
        return {**self._costs[trial.trial_id], **result}
