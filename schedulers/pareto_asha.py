"""Asynchronous successive halving over several objectives with constraints.

The scheme is ASHA's (Li et al. 2020, arXiv 1810.05934) with the multi-objective order of
Schmucker et al. 2021 (arXiv 2106.12639): a trial that reaches a rung goes on if it is among the
best share of those that have reached it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ray_nascomp.errors import ConfigError, InfeasibleError
from ray_nascomp.goals import Goal, as_float
from ray_nascomp.schedulers.past import past_results
from ray_nascomp.schedulers.rungs import most_promising

CostFunction = Callable[[Mapping[str, Any]], Mapping[str, float]]

_GRACE_PERIOD = 2
"""From benchmarks/schedules.py: what is seen before training misleads; a later first rung only costs epochs."""

_TOLERATED = 0.9
"""From the same: with a stricter bar what is compressed most never gets the epochs in which it recovers."""


class ParetoASHAScheduler(FIFOScheduler):
    """Stops trials that are not among the most promising at a rung.

    A feasible trial is never stopped while no other feasible one runs or has run in full. Of those
    that violate a constraint at a rung, all but the worst tenth count as feasible for now.
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
        self._time_attr = time_attr
        count = math.ceil(math.log(max_t / grace_period, reduction_factor) - 1e-9)
        self._milestones = [grace_period * reduction_factor**level for level in range(count)]
        self._rungs: dict[float, dict[str, tuple[list[float], float]]] = {m: {} for m in self._milestones}
        self._stopped: set[str] = set()
        # Trials that run or have run in full, and whose last report is feasible.
        self._feasible: set[str] = set()
        self._costs: dict[str, Mapping[str, float]] = {}

    @property
    def metric(self) -> None:
        """No single metric: the goal has several."""
        return None

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accepts whatever `TuneConfig` says; the goal decides."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Takes up what a trial of a restored experiment has reported."""
        results = past_results(trial)
        for result in results:
            self._record(trial.trial_id, self._with_costs(trial, result))
        if not results:
            return
        status = getattr(trial, "status", Trial.PENDING)
        if status == Trial.TERMINATED and not self._is_complete(results[-1]):
            self._stopped.add(trial.trial_id)
        elif status != Trial.ERROR:
            self._note_feasibility(trial.trial_id, self._with_costs(trial, results[-1]))

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decides at a rung whether the trial goes on."""
        known = self._with_costs(trial, result)
        self._note_feasibility(trial.trial_id, known)
        time = as_float(result.get(self._time_attr))
        if time >= self._max_t:
            return TrialScheduler.STOP
        if self._is_out_of_reach(trial.trial_id):
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
        time = as_float(result.get(self._time_attr))
        milestone = max((m for m in self._milestones if m <= time), default=None)
        if milestone is None or trial_id in self._rungs[milestone]:
            return None
        self._rungs[milestone][trial_id] = (self.goal.losses(result).tolist(), self.goal.violation(result))
        return milestone

    def _is_promising(self, trial_id: str, milestone: float) -> bool:
        rung = self._rungs[milestone]
        losses = np.array([values for values, _ in rung.values()], dtype=float)
        violations = np.array([violation for _, violation in rung.values()])
        position = list(rung).index(trial_id)
        if self._feasible == {trial_id} or (violations[position] == 0 and (violations == 0).sum() == 1):
            return True
        going_on = math.ceil(len(rung) / self._reduction_factor)
        return position in most_promising(losses, violations, _TOLERATED)[:going_on]

    def _note_feasibility(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if self.goal.is_feasible(result):
            self._feasible.add(trial_id)
        else:
            self._feasible.discard(trial_id)

    def _is_complete(self, result: Mapping[str, Any]) -> bool:
        return result.get("final") is True or as_float(result.get(self._time_attr)) >= self._max_t

    def _is_out_of_reach(self, trial_id: str) -> bool:
        costs = self._costs.get(trial_id, {})
        return any(c.violation(as_float(costs.get(c.metric))) > 0 for c in self.goal.constraints)

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
