"""Population-based training over compression: losers go on as smaller networks with winners' weights.

After Jaderberg et al. 2017 (arXiv 1711.09846), in the order that `rungs` tells. What is explored goes one way,
to more sparsity, fewer bits and lower ranks, so that a winner's network contains what becomes of it, as
in progressive shrinking (Cai et al. 2020, arXiv 1908.09791).
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.utils import flatten_dict

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal, as_float, says_infeasible
from ray_nascomp.pareto import ranks
from ray_nascomp.plan import CONTINUE_FROM
from ray_nascomp.schedulers.compression_steps import contains, smaller, with_training
from ray_nascomp.schedulers.past import keep_reports, past_results
from ray_nascomp.schedulers.progress import Progress
from ray_nascomp.schedulers.rungs import most_promising
from ray_nascomp.space import Space

logger = logging.getLogger(__name__)

_TOLERATED = 0.5
"""Share of violating members that count as feasible for now; benchmarks/pbt.py was run with it."""


@dataclass
class _Member:
    """A trial as it was at a milestone."""

    config: Mapping[str, Any]
    losses: list[float]
    violation: float
    checkpoint: str | None = None


class CompressionPBTScheduler(FIFOScheduler):
    """Lets losers go on from winners' weights, as smaller networks.

    Every `interval` reports a trial pauses, which saves it, and is compared with all that have
    been as far. If it is in the worse half and another dominates it, it goes on from the weights
    of one of the better half: as the network that it is, if the winner's structure contains it;
    else as the winner's some steps smaller. The smallest network is thus never given up, however
    bad it still is. Trials wait for nobody, and end by themselves. The trainable has to go on from
    a checkpoint that its config names under "continue_from", as `compression_trainable`'s does.
    What a searcher has suggested ends for it where the trial takes up another config. After
    `Tuner.restore` the population is rebuilt from the trials.

    Args:
        goal: Objectives and constraints. A metric given to `TuneConfig` does not change them.
        space: The `param_space` of the search.
        interval: Reports between two comparisons, 1 or more; the first is after so many.
        seed: Seed of all randomness.
        time_attr: Reported measure of progress, whole numbers.
        max_t: Value of `time_attr` at a trial's last report. Comparisons end when half of the epochs
            are over, as a network that is cut later has little left to recover with. Without it,
            trials are compared to their end.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(
        self,
        goal: Goal,
        space: Mapping[str, Any],
        interval: int = 2,
        seed: int = 0,
        time_attr: str = "training_iteration",
        max_t: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(goal, Goal):
            raise ConfigError(f"goal: {goal!r} was given, a ray_nascomp.Goal is allowed")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ConfigError(f"interval: {interval!r} was given, a whole number of 1 or more is allowed")
        if max_t is not None and not as_float(max_t) >= 1:
            raise ConfigError(f"max_t: {max_t!r} was given, a number of 1 or more, or None, is allowed")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed: {seed!r} was given, a whole number of 0 or more is allowed")
        if not isinstance(space, Mapping):
            raise ConfigError(f"space: {space!r} was given, the param_space of the search is allowed")
        self.goal = goal
        # The first report comes before the first epoch.
        self._last = math.inf if max_t is None else 1 + (max_t - 1) / 2
        if interval > self._last:
            raise ConfigError(
                f"interval: {interval!r} was given; with max_t={max_t!r} comparisons end after {self._last:g} reports"
            )
        self._space = Space(space)
        if not self._space.dimensions:
            raise ConfigError(f"space: {space!r} was given, in which there is nothing to choose")
        self._interval = interval
        self._seed = seed
        self._progress = Progress(time_attr)
        # Milestone -> trial -> how it was there.
        self._population: dict[int, dict[str, _Member]] = {}
        # Trials that have paused at a milestone and have not been judged yet.
        self._waiting: dict[str, int] = {}
        self._continued = 0
        self._warned: set[str] = set()

    @property
    def metric(self) -> None:
        """No single metric: the goal has several."""
        return None

    @property
    def supports_buffered_results(self) -> bool:
        """No: a trial has to pause where it is compared."""
        return False

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accepts whatever `TuneConfig` says; the goal decides."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Takes up what a trial of a restored experiment has reported."""
        results = past_results(trial)
        for result in results:
            self._enter(trial, result)
        for saved, path in self._saved(trial).items():
            if trial.trial_id in self._population.get(saved, {}):
                self._population[saved][trial.trial_id].checkpoint = path
        if results and getattr(trial, "status", None) == Trial.PAUSED:
            milestone = self._milestone(results[-1])
            if milestone is not None:
                self._waiting[trial.trial_id] = milestone

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Pauses the trial at a milestone."""
        milestone = self._enter(trial, result)
        if milestone is None or result.get("final") is True or says_infeasible(result):
            return TrialScheduler.CONTINUE
        self._waiting[trial.trial_id] = milestone
        return TrialScheduler.PAUSE

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Judges the trial no more, unless it is tried again and reports."""
        self._waiting.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Judges the trial no more."""
        self._waiting.pop(trial.trial_id, None)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """A new trial, or the paused one that is least far, judged before it goes on."""
        trials: list[Trial] = tune_controller.get_trials()
        new = next((trial for trial in trials if trial.status == Trial.PENDING), None)
        if new is not None:
            return new
        paused = [trial for trial in trials if trial.status == Trial.PAUSED]
        if not paused:
            return None
        for trial in paused:
            waiting = self._waiting.get(trial.trial_id)
            if waiting is None:
                continue
            saved = self._saved(trial).get(waiting)
            self._population[waiting][trial.trial_id].checkpoint = saved
            if saved is None:
                self._warn_once("a trial has saved nothing at its pause: it starts over, and no other goes on from it")
        trial = min(paused, key=lambda trial: self._waiting.get(trial.trial_id, 0))
        milestone = self._waiting.pop(trial.trial_id, None)
        if milestone is not None:
            self._judge(tune_controller, trial, milestone)
        keep_reports(trial)
        return trial

    def debug_string(self) -> str:
        """How many trials each milestone has seen, for Tune's status."""
        seen = ", ".join(f"{milestone}: {len(members)}" for milestone, members in sorted(self._population.items()))
        return f"CompressionPBT: {self._continued} went on from others' weights; trials seen at each milestone: {seen}"

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("CompressionPBTScheduler: %s", text)

    def _milestone(self, result: Mapping[str, Any]) -> int | None:
        time = self._progress.of(result)
        return int(time) if 0 < time <= self._last and time % self._interval == 0 else None

    def _enter(self, trial: Trial, result: Mapping[str, Any]) -> int | None:
        """Enters a report at a milestone; returns the milestone if the trial is new to it."""
        milestone = self._milestone(result)
        if milestone is None or trial.trial_id in self._population.get(milestone, {}):
            return None
        losses, violation = self.goal.losses(result).tolist(), self.goal.violation(result)
        member = _Member(self._config_of(trial, result), losses, violation)
        self._population.setdefault(milestone, {})[trial.trial_id] = member
        return milestone

    def _config_of(self, trial: Trial, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config of a report: a restored trial may have another by now."""
        names = [f"config/{dimension.name}" for dimension in self._space.dimensions]
        if all(name in result for name in names):
            return self._space.to_config([result[name] for name in names])
        config: Mapping[str, Any] = trial.config
        return config

    def _saved(self, trial: Trial) -> dict[int, str]:
        """Milestone -> where the trial was saved then, within the experiment's folder."""
        storage, metadata = getattr(trial, "storage", None), getattr(trial, "run_metadata", None)
        if storage is None or metadata is None:
            return {}
        manager, saved = metadata.checkpoint_manager, {}
        for result in (*manager.best_checkpoint_results, manager.latest_checkpoint_result):
            milestone = self._milestone(result.metrics) if result is not None else None
            if milestone is None:
                continue
            path = PurePosixPath(result.checkpoint.path)
            if path.is_relative_to(storage.experiment_fs_path):
                saved[milestone] = str(path.relative_to(storage.experiment_fs_path))
        return saved

    def _judge(self, tune_controller: Any, trial: Trial, milestone: int) -> None:
        """Gives a loser another config, which names the winner's checkpoint."""
        members = self._population[milestone]
        for other in tune_controller.get_trials():
            if other.trial_id in members:  # What num_to_keep has deleted since is no one's to go on from.
                members[other.trial_id].checkpoint = self._saved(other).get(milestone)
        losses = np.array([member.losses for member in members.values()], dtype=float)
        violations = np.array([member.violation for member in members.values()])
        order = most_promising(losses, violations, _TOLERATED)
        names = list(members)
        place = order.tolist().index(names.index(trial.trial_id))
        is_dominated = ranks(losses, np.zeros(len(losses)))[names.index(trial.trial_id)] > 0
        if place < len(names) - len(names) // 2 or not is_dominated:
            return
        better = [members[names[position]] for position in order[: len(names) // 2]]
        better = [member for member in better if member.checkpoint is not None and member.violation < np.inf]
        if not better:
            return
        own = members[trial.trial_id].config
        # The seed follows from the trial: the order in which trials are judged does not matter.
        rng = np.random.default_rng([self._seed, milestone, zlib.crc32(self._space.key(own).encode())])
        containing = [member for member in better if contains(self._space, member.config, own)]
        winner = (containing or better)[int(rng.integers(len(containing or better)))]
        if containing:
            config = with_training(rng, self._space, own, winner.config)
        else:
            config = smaller(rng, self._space, winner.config)
        self._end_for_searcher(tune_controller, trial)
        trial.set_config({**config, CONTINUE_FROM: winner.checkpoint})
        self._continued += 1

    def _end_for_searcher(self, tune_controller: Any, trial: Trial) -> None:
        """Tells the searcher what became of its own config; what comes now is another's."""
        search = getattr(tune_controller, "search_alg", None)
        if search is not None and CONTINUE_FROM not in trial.config:
            search.on_trial_complete(trial.trial_id, result=flatten_dict(dict(trial.last_result)))
