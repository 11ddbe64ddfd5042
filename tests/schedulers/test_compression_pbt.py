from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.plan import CONTINUE_FROM
from ray_nascomp.schedulers import CompressionPBTScheduler
from ray_nascomp.searchers import EvolutionarySearch

GOAL = nc.Goal([nc.Objective("a"), nc.Objective("size", "min")], [nc.Constraint("drop", "<=", 0.1)])
SPACE = {"prune": {"sparsity": {"g": nc.sparsity()}}, "finetune": {"lr": tune.loguniform(1e-4, 1e-2)}}


class FakeTrial(SimpleNamespace):
    def set_config(self, config):
        self.config = config


class Search:
    """Tune's part towards the scheduler and its trials."""

    def __init__(self, scheduler):
        self.scheduler, self.trials, self.ended = scheduler, [], []
        self.search_alg = SimpleNamespace(
            on_trial_complete=lambda trial_id, result: self.ended.append((trial_id, result))
        )

    def get_trials(self):
        return self.trials

    def add(self, name, sparsity):
        saved = SimpleNamespace(best_checkpoint_results=[], latest_checkpoint_result=None)
        trial = FakeTrial(
            trial_id=name,
            status=Trial.RUNNING,
            config={"prune": {"sparsity": {"g": sparsity}}, "finetune": {"lr": 1e-3}},
            last_result={},
            storage=SimpleNamespace(experiment_fs_path="/runs/x", trial_dir_name=None),
            run_metadata=SimpleNamespace(checkpoint_manager=saved),
        )
        self.trials.append(trial)
        self.scheduler.on_trial_add(self, trial)
        return trial

    def report(self, trial, time, a, size, drop=0.0, **more):
        result = {"a": a, "size": size, "drop": drop, "training_iteration": time, **more}
        decision = self.scheduler.on_trial_result(self, trial, result)
        trial.last_result = {**result, "trial_id": trial.trial_id}
        if decision == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
            checkpoint = SimpleNamespace(path=f"/runs/x/{trial.trial_id}/checkpoint_{time:06}")
            saved = SimpleNamespace(metrics=result, checkpoint=checkpoint)
            trial.run_metadata.checkpoint_manager.best_checkpoint_results.append(saved)
            trial.run_metadata.checkpoint_manager.latest_checkpoint_result = saved
        return decision

    def go_on(self):
        trial = self.scheduler.choose_trial_to_run(self)
        if trial is not None:
            trial.status = Trial.RUNNING
        return trial


def population(points, **options):
    """Trials t0, t1, ... at the first milestone: (sparsity, a, size, drop)."""
    search = Search(CompressionPBTScheduler(GOAL, SPACE, interval=2, **options))
    for number, (sparsity, a, size, drop) in enumerate(points):
        trial = search.add(f"t{number}", sparsity)
        assert search.report(trial, 1, 0.0, size) == TrialScheduler.CONTINUE
        assert search.report(trial, 2, a, size, drop) == TrialScheduler.PAUSE
    while search.go_on() is not None:
        pass
    return search


FRONT = [(0.1, 0.9, 9.0, 0.0), (0.3, 0.8, 6.0, 0.0), (0.5, 0.7, 4.0, 0.0)]


def test_a_loser_that_a_winner_contains_keeps_its_structure_and_takes_the_weights():
    search = population([*FRONT, (0.6, 0.1, 9.5, 0.0)])
    loser = search.trials[3]
    assert loser.config["prune"] == {"sparsity": {"g": 0.6}}
    assert loser.config[CONTINUE_FROM] in {f"t{n}/checkpoint_000002" for n in range(3)}
    assert all(CONTINUE_FROM not in trial.config for trial in search.trials[:3])
    assert [(name, result["a"]) for name, result in search.ended] == [("t3", 0.1)]


def test_a_loser_that_none_contains_becomes_a_winners_smaller_network():
    search = population([*FRONT, (0.0, 0.1, 9.5, 0.0)])
    config = search.trials[3].config
    winner = {f"t{n}/checkpoint_000002": point[0] for n, point in enumerate(FRONT)}[config[CONTINUE_FROM]]
    assert winner < config["prune"]["sparsity"]["g"] <= winner + 0.15 + 1e-9


def test_feasible_ones_win_and_nan_and_infeasible_plans_hand_on_nothing():
    points = [(0.1, 9.0, 1.0, 5.0), (0.3, math.nan, 6.0, 0.0), (0.5, 0.7, 4.0, 0.0), (0.4, 0.8, 4.1, 0.0)]
    search = population([*points, (0.2, 0.1, 4.5, 0.2)])
    assert search.trials[1].config[CONTINUE_FROM] in {"t2/checkpoint_000002", "t3/checkpoint_000002"}
    search = Search(CompressionPBTScheduler(GOAL, SPACE, interval=1))
    trial = search.add("t", 0.5)
    assert search.report(trial, 1, 0.0, 9.0, feasible=False) == TrialScheduler.CONTINUE
    assert search.report(search.add("u", 0.5), 1, 0.5, 9.0, final=True) == TrialScheduler.CONTINUE


def test_what_no_other_dominates_is_never_given_up():
    tiny = (0.9, 0.1, 0.5, 0.5)
    search = population([*FRONT, tiny, (0.2, 0.6, 9.5, 0.0), (0.2, 0.5, 9.6, 0.0)])
    assert [CONTINUE_FROM in trial.config for trial in search.trials] == [False] * 4 + [True] * 2


def test_new_trials_start_before_paused_ones_go_on_and_the_least_far_first():
    search = population(FRONT)
    for trial in search.trials[:2]:
        search.report(trial, 3, 1.0, 1.0)
        search.report(trial, 4, 1.0, 1.0)
    assert search.report(search.add("late", 0.2), 2, 0.5, 7.0) == TrialScheduler.PAUSE
    new = search.add("new", 0.2)
    new.status = Trial.PENDING
    assert search.go_on() is new
    assert search.go_on().trial_id == "late"
    assert search.scheduler.choose_trial_to_run(search) is search.scheduler.choose_trial_to_run(search)


def test_the_population_is_rebuilt_after_a_restore():
    lived = population([*FRONT, (0.6, 0.1, 9.5, 0.0)])
    restored = Search(CompressionPBTScheduler(GOAL, SPACE, interval=2))
    for trial in lived.trials:
        restored.trials.append(trial)
        restored.scheduler.on_trial_add(restored, trial)
        restored.scheduler.on_trial_add(restored, trial)
    for search in (lived, restored):
        loser = search.add("next", 0.7)
        search.report(loser, 2, 0.05, 9.9)
        search.go_on()
    assert lived.trials[-1].config == restored.trials[-1].config
    assert CONTINUE_FROM in restored.trials[-1].config


def test_two_equal_populations_become_the_same():
    configs = [[trial.config for trial in population([*FRONT, (0.0, 0.1, 9.5, 0.0)]).trials] for _ in range(2)]
    assert configs[0] == configs[1]
    other = [trial.config for trial in population([*FRONT, (0.0, 0.1, 9.5, 0.0)], seed=1).trials]
    assert other[:3] == configs[0][:3]


@pytest.mark.parametrize(
    "arguments",
    [
        {"goal": "accuracy"},
        {"interval": 0},
        {"interval": 1.5},
        {"interval": 6, "max_t": 9},
        {"max_t": 0},
        {"max_t": "9"},
        {"seed": "x"},
        {"seed": -1},
        {"space": None},
        {"space": {}},
    ],
)
def test_mistakes_are_named(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        CompressionPBTScheduler(**{"goal": GOAL, "space": SPACE, **arguments})


def test_a_checkpoint_that_was_deleted_is_no_ones_to_go_on_from(caplog):
    search = Search(CompressionPBTScheduler(GOAL, SPACE, interval=2))
    best = search.add("best", 0.1)
    search.report(best, 2, 0.9, 1.0)
    search.go_on()
    search.report(best, 4, 0.9, 1.0)
    search.report(search.add("worst", 0.1), 2, 0.1, 9.0)
    best.run_metadata.checkpoint_manager.best_checkpoint_results.pop(0)
    assert CONTINUE_FROM not in search.go_on().config
    silent = search.add("silent", 0.1)
    search.report(silent, 2, 0.2, 9.0)
    silent.run_metadata.checkpoint_manager = SimpleNamespace(best_checkpoint_results=[], latest_checkpoint_result=None)
    search.go_on()
    assert "saved nothing" in caplog.text


def test_a_measure_of_progress_that_is_not_reported_is_named(caplog):
    search = Search(CompressionPBTScheduler(GOAL, SPACE, time_attr="epochs"))
    assert search.report(search.add("t", 0.1), 2, 0.5, 1.0) == TrialScheduler.CONTINUE
    assert "'epochs'" in caplog.text


def test_it_is_made_by_name():
    scheduler = tune.create_scheduler("compression_pbt", goal=GOAL, space=SPACE)
    assert isinstance(scheduler, CompressionPBTScheduler)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_losers_continue_from_winners_also_after_the_driver_has_died(ray_session, digits_task, tmp_path, dies):
    goal = nc.Goal([nc.Objective("accuracy"), nc.Objective("params", "min")])
    space = nc.compression_space(digits_task)
    trainable = nc.compression_trainable(digits_task, goal, epochs=4)
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(goal, nc.CostModel(digits_task), seed=0),
            scheduler=CompressionPBTScheduler(goal, space, interval=2),
            num_samples=8,
            max_concurrent_trials=8,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path),
            name="pbt",
            verbose=0,
            callbacks=[Death(tmp_path / "died", reports=26)] if dies else [],
        ),
    )
    if dies:
        with pytest.raises(Exception, match="the driver dies"):
            tuner.fit()
        tuner = nc.restore(str(tmp_path / "pbt"), trainable)
    grid = tuner.fit()
    assert not grid.errors
    results = nc.Results(grid)
    assert len(results) == 8
    continued = [trial for trial in results.trials if CONTINUE_FROM in trial.config]
    assert continued
    for trial in continued:
        steps = [row["training_iteration"] for row in trial.rows]
        assert sorted(set(steps)) == [1, 2, 3, 4, 5]
        assert dies or steps == [1, 2, 3, 4, 5]  # After a death, steps since the last checkpoint are done again.
        manifest = json.loads((Path(trial.checkpoint) / "manifest.json").read_text())
        assert manifest["continued"]
        assert manifest["config"] == trial.config
        assert manifest["metrics"]["params"] == trial.metrics["params"]
        winner = json.loads((tmp_path / "pbt" / trial.config[CONTINUE_FROM] / "manifest.json").read_text())
        for name, units in winner["removed"].items():
            assert set(units) <= set(manifest["removed"].get(name, []))


class Death(tune.Callback):
    """Ends the driver once, after some reports."""

    def __init__(self, mark, reports):
        self.mark, self.left = mark, reports

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.left -= 1
        if self.left < 0 and not self.mark.exists():
            self.mark.touch()
            raise RuntimeError("the driver dies")


def test_results_that_almost_meet_a_constraint_early_do_not_lose_to_large_networks():
    violating = [(0.8, 0.7, 1.0, 0.1), (0.0, 0.6, 9.0, 0.15), (0.1, 0.5, 9.5, 0.3)]
    search = population([(0.2, 0.9, 9.0, 0.0), *violating])
    assert [CONTINUE_FROM in trial.config for trial in search.trials] == [False, False, True, True]


def test_comparisons_end_when_half_of_the_epochs_are_over():
    search = Search(CompressionPBTScheduler(GOAL, SPACE, interval=2, max_t=9))
    trial = search.add("t", 0.5)
    decisions = [search.report(trial, time, 0.5, 9.0) for time in range(1, 9)]
    assert [time for time, decision in enumerate(decisions, 1) if decision == TrialScheduler.PAUSE] == [2, 4]
