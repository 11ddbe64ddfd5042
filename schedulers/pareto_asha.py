"""Asynchronous successive halving over several objectives with constraints.

The scheme is ASHA's (Li et al. 2020, arXiv 1810.05934) with the multi-objective order of
Schmucker et al. 2021 (arXiv 2106.12639): a trial that reaches a rung goes on if it is among the
best share of those that have reached it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal
from ray_nascomp.schedulers.rungs import promotion_order


class ParetoASHAScheduler(FIFOScheduler):
    """Stops trials that are not among the most promising at a rung.

    Args:
        goal: Objectives and constraints. A metric given to `TuneConfig` does not change them.
        max_t: Value of `time_attr` at which a trial has run in full; it ends there.
        grace_period: Value of `time_attr` at the first rung.
        reduction_factor: Of so many trials at a rung one goes on, above 1; rungs lie this
            factor apart.
        time_attr: Reported measure of progress.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(
        self,
        goal: Goal,
        max_t: float = 100,
        grace_period: float = 1,
        reduction_factor: float = 3,
        time_attr: str = "training_iteration",
    ) -> None:
        super().__init__()
        if not isinstance(goal, Goal):
            raise ConfigError(f"goal: {goal!r} was given, a ray_nascomp.Goal is allowed")
        if not 0 < grace_period <= max_t:
            raise ConfigError(f"grace_period: {grace_period!r} was given, more than 0 and up to max_t={max_t!r}")
        if not reduction_factor > 1:
            raise ConfigError(f"reduction_factor: {reduction_factor!r} was given, a number above 1 is allowed")
        self.goal = goal
        self._max_t = max_t
        self._reduction_factor = reduction_factor
        self._time_attr = time_attr
        count = math.ceil(math.log(max_t / grace_period, reduction_factor) - 1e-9)
        self._milestones = [grace_period * reduction_factor**level for level in range(count)]
        self._rungs: dict[float, dict[str, tuple[list[float], float]]] = {m: {} for m in self._milestones}
        self._stopped = 0

    @property
    def metric(self) -> None:
        """No single metric: the goal has several."""
        return None

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accepts whatever `TuneConfig` says; the goal decides."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Takes up what a trial of a restored experiment has reported."""
        for result in _past_results(trial):
            self._record(trial.trial_id, result)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decides at a rung whether the trial goes on."""
        time = result.get(self._time_attr)
        if not isinstance(time, (int, float)):
            return TrialScheduler.CONTINUE
        if time >= self._max_t:
            return TrialScheduler.STOP
        milestone = self._record(trial.trial_id, result)
        if milestone is None or self._is_promising(trial.trial_id, milestone):
            return TrialScheduler.CONTINUE
        self._stopped += 1
        return TrialScheduler.STOP

    def debug_string(self) -> str:
        """How many trials each rung has seen, for Tune's status."""
        rungs = ", ".join(f"{milestone:g}: {len(rung)}" for milestone, rung in self._rungs.items())
        return f"ParetoASHA: {self._stopped} trials stopped; trials seen at each rung: {rungs}"

    def _record(self, trial_id: str, result: Mapping[str, Any]) -> float | None:
        """Enters a result into the highest rung it has reached; returns that rung if it is new to it."""
        time = result.get(self._time_attr)
        if not isinstance(time, (int, float)):
            return None
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
        if violations[position] == 0 and (violations == 0).sum() == 1:
            return True  # The last feasible one is never given up.
        kept = promotion_order(losses, violations)[: math.ceil(len(rung) / self._reduction_factor)]
        return position in kept


def _past_results(trial: Trial) -> Iterable[Mapping[str, Any]]:
    """What a trial reported before the experiment was restored, oldest first; nothing for a new one."""
    last = getattr(trial, "last_result", None) or {}
    if not last:
        return []
    results: list[Mapping[str, Any]] = []
    storage = getattr(trial, "storage", None)
    if storage is not None and storage.trial_dir_name:
        path = str(PurePosixPath(storage.trial_fs_path) / "result.json")
        try:
            with storage.storage_filesystem.open_input_stream(path) as stream:
                lines = stream.read().decode().splitlines()
            results = [json.loads(line) for line in lines if line.endswith("}")]
        except (OSError, ValueError):
            results = []
    return [*results, last]
