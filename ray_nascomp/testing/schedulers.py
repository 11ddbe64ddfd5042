"""A conformance suite for schedulers over a goal: what Ray Tune may do to one in a search's life.

    class TestMyScheduler(SchedulerConformance):
        def make_scheduler(self, goal, max_t):
            return MyScheduler(goal, max_t=max_t)

The tests use Tune's own `Trial`, without workers, except the last, which runs a real search.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from ray_nascomp.goals import Constraint, Goal, Objective

GOAL = Goal([Objective("accuracy"), Objective("size", "min")], [Constraint("drop", "<=", 0.1)])
MAX_T = 9
_DECISIONS = {TrialScheduler.CONTINUE, TrialScheduler.STOP, TrialScheduler.PAUSE, TrialScheduler.NOOP}


class ScheduledSearch:
    """Plays the part of Tune towards a scheduler, in Tune's order of calls.

    It is what the scheduler gets as `tune_controller`.

    Args:
        scheduler: The scheduler.

    Attributes:
        trials: Name -> trial.
    """

    def __init__(self, scheduler: TrialScheduler) -> None:
        self.scheduler: Any = scheduler  # Of whose hooks Ray says too little, or too much.
        self.trials: dict[str, Trial] = {}

    def get_trials(self) -> list[Trial]:
        """All trials, as a scheduler may ask for them."""
        return list(self.trials.values())

    def add(self, name: str) -> Trial:
        """Adds a trial and lets it run."""
        trial = Trial("conformance", stub=True, config={"name": name}, trial_id=name)
        self.trials[name] = trial
        self.scheduler.on_trial_add(self, trial)
        trial.status = Trial.RUNNING
        return trial

    def report(self, name: str, result: Mapping[str, Any]) -> str:
        """A trial reports; returns the decision, and carries it out."""
        trial = self.trials.get(name) or self.add(name)
        decision: str = self.scheduler.on_trial_result(self, trial, dict(result))
        trial.update_last_result({**result, "trial_id": name})
        if decision == TrialScheduler.STOP:
            trial.status = Trial.TERMINATED
            self.scheduler.on_trial_complete(self, trial, dict(trial.last_result))
        elif decision == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
        return decision


def report(time: int, accuracy: float, size: float, drop: float = 0.0, **more: Any) -> dict[str, Any]:
    """A report on `GOAL`."""
    return {"accuracy": accuracy, "size": size, "drop": drop, "training_iteration": time, **more}


class SchedulerConformance:
    """Derive from it, name the class `Test...`, and write `make_scheduler`."""

    def make_scheduler(self, goal: Goal, max_t: int) -> TrialScheduler:
        """A new scheduler for trials that report `goal`'s metrics up to `training_iteration` max_t."""
        raise NotImplementedError

    def search(self) -> ScheduledSearch:
        """A search with a new scheduler."""
        scheduler = self.make_scheduler(GOAL, MAX_T)
        scheduler.set_search_properties(None, None)
        return ScheduledSearch(scheduler)

    def test_its_metric_is_none_or_one_name(self) -> None:
        """Tune refuses a list."""
        assert self.make_scheduler(GOAL, MAX_T).metric is None or isinstance(
            self.make_scheduler(GOAL, MAX_T).metric, str
        )

    def test_decisions_are_tunes_and_repeatable(self) -> None:
        """Two equal schedulers, one of which has been pickled, decide alike through a whole life."""
        lived = self.search()
        pickled = ScheduledSearch(pickle.loads(pickle.dumps(self.make_scheduler(GOAL, MAX_T))))
        pickled.scheduler.set_search_properties(None, None)
        decisions = [_live(search, seed=0) for search in (lived, pickled)]
        assert decisions[0] == decisions[1]
        assert set(decisions[0]) <= _DECISIONS

    def test_broken_reports_do_not_raise(self) -> None:
        """NaN, infinity, text, missing metrics, missing time, an infeasible plan."""
        search = self.search()
        search.report("good", report(1, 0.9, 1.0))
        for number, broken in enumerate(
            [
                report(1, math.nan, 1.0),
                report(1, math.inf, -math.inf),
                report(1, 0.5, 1.0, drop=math.nan),
                {**report(1, 0.5, 1.0), "accuracy": "high"},
                {"training_iteration": 1},
                {"accuracy": 0.5, "size": 1.0, "drop": 0.0},
                report(1, 0.0, 9.0, feasible=False, reason="a layer would be empty"),
            ]
        ):
            assert search.report(f"broken{number}", broken) in _DECISIONS

    def test_the_last_feasible_trial_is_never_stopped(self) -> None:
        """However good those look that break a constraint, and although a better one has failed."""
        search = self.search()
        search.report("failed", report(1, 0.99, 0.1))
        search.scheduler.on_trial_error(search, search.trials["failed"])
        for number in range(12):
            search.report(f"bad{number}", report(1, 0.9 + 0.001 * number, 0.1, drop=0.9))
        for time in range(1, MAX_T):
            assert search.report("feasible", report(time, 0.1, 9.0)) != TrialScheduler.STOP

    def test_retries_and_late_reports_do_not_raise_or_count_twice(self) -> None:
        """`on_trial_error` and `on_trial_add` may come twice; a report may follow a stop."""
        searches = [self.search(), self.search()]
        for search in searches:
            for number in range(6):
                search.report(f"t{number}", report(1, 0.5 + 0.05 * number, 5.0 - number))
        retried = searches[0]
        for trial in retried.get_trials():
            if trial.status != Trial.TERMINATED:
                retried.scheduler.on_trial_error(retried, trial)
                retried.scheduler.on_trial_error(retried, trial)
                retried.scheduler.on_trial_add(retried, trial)
                retried.scheduler.on_trial_add(retried, trial)
        decisions = [search.report("next", report(1, 0.6, 3.0)) for search in searches]
        assert decisions[0] == decisions[1]
        for trial in retried.get_trials():
            assert retried.scheduler.on_trial_result(retried, trial, report(2, 0.5, 1.0)) in _DECISIONS

    def test_a_restored_scheduler_decides_like_the_one_that_lived(self) -> None:
        """After a restore all trials are added again, the ended ones too, with their last reports."""
        lived = self.search()
        for number in range(9):
            lived.report(f"t{number}", report(1, 0.5 + 0.05 * (number % 5), 5.0 - number % 4))
        restored = self.search()
        restored.trials = dict(lived.trials)
        for trial in restored.get_trials():
            restored.scheduler.on_trial_add(restored, trial)
        for name, accuracy, size in (("worst", 0.1, 9.0), ("best", 0.99, 0.1), ("middling", 0.6, 4.0)):
            one, other = (search.report(name, report(1, accuracy, size)) for search in (lived, restored))
            assert one == other

    def test_hooks_take_trials_that_never_reported(self) -> None:
        """Trials may be removed, fail, or end before their first report."""
        search = self.search()
        search.scheduler.on_trial_remove(search, search.add("removed"))
        search.scheduler.on_trial_error(search, search.add("failed"))
        search.scheduler.on_trial_complete(search, search.add("ended"), {})
        assert isinstance(search.scheduler.debug_string(), str)

    def test_it_chooses_a_pending_trial_and_none_without(self) -> None:
        """Asking twice gives the same answer."""
        search = self.search()
        assert search.scheduler.choose_trial_to_run(search) is None
        trial = search.add("waiting")
        trial.status = Trial.PENDING
        assert search.scheduler.choose_trial_to_run(search) is trial
        assert search.scheduler.choose_trial_to_run(search) is trial

    def test_a_real_search_ends(self, tmp_path: Path) -> None:
        """Twelve short trials under Ray: none fails, and one at least runs in full."""
        tuner = tune.Tuner(
            CurveTrainable,
            param_space={"end": tune.uniform(0.5, 1.0), "size": tune.uniform(1.0, 9.0)},
            tune_config=tune.TuneConfig(
                scheduler=self.make_scheduler(GOAL, MAX_T), num_samples=12, reuse_actors=True, max_concurrent_trials=2
            ),
            run_config=tune.RunConfig(
                storage_path=str(tmp_path), name="conformance", verbose=0, stop={"training_iteration": MAX_T}
            ),
        )
        grid = tuner.fit()
        assert not grid.errors
        lengths = [(grid[i].metrics or {})["training_iteration"] for i in range(len(grid))]
        assert len(lengths) == 12
        assert max(lengths) == MAX_T


class CurveTrainable(tune.Trainable):
    """A learning curve by formula: accuracy rises to `config["end"]` at a known size.

    Reports accuracy, size and drop (how far the accuracy is below 0.8).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Starts at time 0."""
        self._end, self._size, self._time = float(config["end"]), float(config["size"]), 0

    def step(self) -> dict[str, Any]:
        """One report."""
        self._time += 1
        accuracy = self._end - 0.3 / self._time
        return {"accuracy": accuracy, "size": self._size, "drop": max(0.0, 0.8 - accuracy)}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Starts again with another config."""
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes how far it is."""
        (Path(checkpoint_dir) / "state.json").write_text(json.dumps({"time": self._time}))

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        """Goes on from there; the config stays the trial's own."""
        self._time = json.loads((Path(checkpoint) / "state.json").read_text())["time"]


def _live(search: ScheduledSearch, seed: int) -> list[str]:
    """Twenty trials with random curves report in turns; the decisions in their order."""
    rng = np.random.default_rng(seed)
    ends, sizes = rng.uniform(0.5, 1.0, 20), rng.uniform(1.0, 9.0, 20)
    decisions = []
    running = dict.fromkeys(range(20))
    for time in range(1, MAX_T + 1):
        for number in list(running):
            accuracy = float(ends[number] - 0.3 / time)
            result = report(time, accuracy, float(sizes[number]), drop=max(0.0, 0.8 - accuracy))
            decisions.append(search.report(f"t{number}", result))
            if decisions[-1] == TrialScheduler.STOP:
                del running[number]
    return decisions
