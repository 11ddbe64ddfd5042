"""Stops trials that will not reach the goal's constraints; wraps any other scheduler.

Each constrained metric's learning curve is extrapolated with uncertainty, from what has become of
trials that stood as it stands (see `ray_nascomp.schedulers.learning_curve`); a trial ends once it
is nearly certain to break a constraint when it has run in full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal, as_float, says_infeasible
from ray_nascomp.schedulers.learning_curve import probability_below
from ray_nascomp.schedulers.past import past_results
from ray_nascomp.schedulers.progress import Progress

_LEAST, _MOST = 10, 200
"""Trials that have run in full by which others are judged: more of them say no more."""


class FeasibilityScheduler(FIFOScheduler):
    """Stops hopeless trials, and leaves all else to another scheduler.

    A trial whose last report fulfils the constraints is never stopped for their sake. A report
    that says `feasible: False` ends its trial at once, for its plan cannot be carried out.
    Nothing else is stopped before ten trials have run in full: up to `max_t`, or to a report that
    says `final: True`. After `Tuner.restore` the curves are rebuilt from what the trials have reported.

    Args:
        goal: Its constraints count. A metric given to `TuneConfig` goes to the other scheduler.
        max_t: Value of `time_attr` at which a trial has run in full.
        scheduler: The other scheduler; Tune's FIFO if absent. It hears of everything first.
        grace_period: Reports of a metric before it is extrapolated, 2 or more.
        confidence: Probability of breaking a constraint from which on a trial is stopped,
            above 0.5 and below 1; every report is another chance to be wrong.
        time_attr: Reported measure of progress, positive.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(
        self,
        goal: Goal,
        max_t: float,
        scheduler: TrialScheduler | None = None,
        grace_period: int = 3,
        confidence: float = 0.99,
        time_attr: str = "training_iteration",
    ) -> None:
        super().__init__()
        if not isinstance(goal, Goal) or not goal.constraints:
            raise ConfigError(f"goal: {goal!r} was given, a ray_nascomp.Goal with constraints is allowed")
        if not as_float(max_t) > 0:
            raise ConfigError(f"max_t: {max_t!r} was given, a positive number is allowed")
        if scheduler is not None and not isinstance(scheduler, TrialScheduler):
            raise ConfigError(f"scheduler: {scheduler!r} was given, a Tune scheduler is allowed")
        if not as_float(grace_period) >= 2:
            raise ConfigError(f"grace_period: {grace_period!r} was given, 2 or more is allowed")
        if not 0.5 < as_float(confidence) < 1:
            raise ConfigError(f"confidence: {confidence!r} was given, above 0.5 and below 1 is allowed")
        self.goal = goal
        self._max_t = max_t
        self._scheduler = scheduler or FIFOScheduler()
        self._grace_period = grace_period
        self._confidence = confidence
        self._progress = Progress(time_attr)
        # Trial -> metric -> time -> value.
        self._curves: dict[str, dict[str, dict[float, float]]] = {}
        self._in_full: dict[str, dict[str, dict[float, float]]] = {}
        self._stopped: set[str] = set()

    @property
    def metric(self) -> str | None:
        """The other scheduler's metric."""
        metric: str | None = self._scheduler.metric
        return metric

    @property
    def supports_buffered_results(self) -> bool:
        """Whether the other scheduler takes several results at a time."""
        return bool(self._scheduler.supports_buffered_results)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Passes the metric of `TuneConfig` on."""
        return bool(self._scheduler.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Takes up what a trial of a restored experiment has reported."""
        results = past_results(trial)
        for result in results:
            self._record(trial.trial_id, result)
        if results and getattr(trial, "status", Trial.PENDING) == Trial.TERMINATED:
            self._end(trial.trial_id, results[-1])
        self._scheduler.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Asks the other scheduler, and stops what it would continue without hope."""
        self._record(trial.trial_id, result)
        decision: str = self._scheduler.on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.CONTINUE and self._is_hopeless(trial.trial_id, result):
            self._stopped.add(trial.trial_id)
            return TrialScheduler.STOP
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Keeps the curve of a trial that has run in full, and forgets any other."""
        self._record(trial.trial_id, result)
        self._end(trial.trial_id, result)
        self._scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Passes it on; the trial keeps its curve, with which it may be tried again."""
        self._scheduler.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Forgets the curve."""
        self._curves.pop(trial.trial_id, None)
        self._scheduler.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The other scheduler's choice."""
        return self._scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """How many trials were stopped, for Tune's status."""
        return f"Feasibility: {len(self._stopped)} trials without hope stopped; {self._scheduler.debug_string()}"

    def _record(self, trial_id: str, result: Mapping[str, Any]) -> None:
        time = self._progress.of(result)
        if not time > 0:
            return
        curves = self._curves.setdefault(trial_id, {})
        for constraint in self.goal.constraints:
            value = as_float(result.get(constraint.metric))
            if math.isfinite(value):
                curves.setdefault(constraint.metric, {})[time] = value

    def _end(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Keeps the curves that have come to their end, of the last trials to run in full."""
        curves = self._curves.pop(trial_id, {})
        time = self._progress.of(result)
        is_in_full = time >= self._max_t or result.get("final") is True
        if not is_in_full or says_infeasible(result):
            return
        self._in_full[trial_id] = {metric: curve for metric, curve in curves.items() if max(curve) >= time}
        if len(self._in_full) > _MOST:
            del self._in_full[next(iter(self._in_full))]

    def _is_hopeless(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        if says_infeasible(result):
            return True
        time = self._progress.of(result)
        if time >= self._max_t:
            return False
        for constraint in self.goal.constraints:
            value = as_float(result.get(constraint.metric))
            reports = len(self._curves.get(trial_id, {}).get(constraint.metric, {}))
            if reports < self._grace_period or not constraint.violation(value) > 0:
                continue
            others = self._others(constraint.metric, time)
            if len(others) < _LEAST:
                continue
            seen, ends = np.array(others).T
            below = probability_below(value, seen, ends, constraint.bound)
            if (below if constraint.op == "<=" else 1.0 - below) < 1.0 - self._confidence:
                return True
        return False

    def _others(self, metric: str, time: float) -> list[tuple[float, float]]:
        """The values at a time, and at their ends, of the last trials to run in full that had reported by then."""
        curves = [curves[metric] for curves in self._in_full.values() if metric in curves]
        points = [np.array(sorted(curve.items())).T for curve in curves if min(curve) <= time]
        return [(float(np.interp(time, times, values)), float(values[-1])) for times, values in points]
