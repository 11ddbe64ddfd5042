from __future__ import annotations

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
from ray import tune
from ray.tune.schedulers import TrialScheduler

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.schedulers import ParetoASHAScheduler
from ray_nascomp.schedulers.rungs import most_promising

GOAL = nc.Goal([nc.Objective("a"), nc.Objective("b")], [nc.Constraint("drop", "<=", 0.1)])


def trial(name, **attributes):
    return SimpleNamespace(**{"trial_id": name, "last_result": {}, "storage": None, "config": {}, **attributes})


def report(scheduler, name, time, a, b, drop=0.0):
    result = {"a": a, "b": b, "drop": drop, "training_iteration": time}
    return scheduler.on_trial_result(None, trial(name), result)


def test_dominated_trials_stop_and_trade_offs_go_on():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=2)
    assert report(scheduler, "first", 1, 1.0, 0.0) == TrialScheduler.CONTINUE
    assert report(scheduler, "dominated", 1, 0.5, -1.0) == TrialScheduler.STOP
    assert report(scheduler, "tradeoff", 1, 0.0, 1.0) == TrialScheduler.CONTINUE
    assert report(scheduler, "worse", 1, 0.2, -2.0) == TrialScheduler.STOP
    assert report(scheduler, "first", 2, 1.0, 0.0) == TrialScheduler.CONTINUE
    assert report(scheduler, "first", 3, 1.0, 0.0) == TrialScheduler.CONTINUE
    assert report(scheduler, "first", 9, 1.0, 0.0) == TrialScheduler.STOP


def test_rungs_lie_a_factor_apart_up_to_the_end():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=3)
    assert scheduler._milestones == [1, 3]
    assert ParetoASHAScheduler(GOAL, max_t=3, grace_period=3)._milestones == []
    assert ParetoASHAScheduler(GOAL, max_t=27)._milestones == [2, 6, 18]
    assert ParetoASHAScheduler(GOAL, max_t=2)._milestones == []


def test_the_last_feasible_trial_is_never_stopped():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=4)
    for number in range(8):
        report(scheduler, f"bad{number}", 1, 10.0 + number, 10.0, drop=0.5)
    assert report(scheduler, "feasible", 1, -5.0, -5.0, drop=0.0) == TrialScheduler.CONTINUE


def test_the_bar_for_constraints_is_relative_while_all_violate():
    losses = np.array([[0.0], [1.0], [-9.0], [-8.0]])
    violations = np.array([0.2, 0.1, 5.0, 6.0])
    assert [sorted(most_promising(losses, violations, 0.5)[:count]) for count in (1, 2, 3, 4)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]


def test_of_trials_that_all_violate_early_the_most_compressed_go_on_but_for_the_worst():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=2)
    drops = np.linspace(0.2, 0.6, 12)
    for number, drop in enumerate(drops):  # What is smaller drops more: a front.
        report(scheduler, f"t{number}", 1, 1 - drop, drop, drop=drop)
    assert report(scheduler, "small", 1, 0.45, 0.8, drop=0.55) == TrialScheduler.CONTINUE
    assert report(scheduler, "hopeless", 1, 0.1, 0.9, drop=0.9) == TrialScheduler.STOP


def test_broken_results_come_last_and_stop_nothing_else():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=2)
    assert report(scheduler, "good", 1, 0.0, 0.0) == TrialScheduler.CONTINUE
    assert report(scheduler, "nan", 1, math.nan, 0.0) == TrialScheduler.STOP
    assert scheduler.on_trial_result(None, trial("lacks"), {"training_iteration": 1}) == TrialScheduler.STOP
    assert scheduler.on_trial_result(None, trial("timeless"), {"a": 1.0}) == TrialScheduler.CONTINUE
    assert report(scheduler, "better", 1, 1.0, 1.0) == TrialScheduler.CONTINUE


def test_order_within_a_front_spreads_out():
    front = np.array([[0.0, 1.0], [0.02, 0.98], [0.5, 0.5], [1.0, 0.0]])
    assert most_promising(front, np.zeros(4), 0.5)[:2].tolist() == [0, 3]
    assert most_promising(front, np.zeros(4), 0.5)[:3].tolist() == [0, 3, 2]
    behind = np.array([[2.0, 2.0], *front.tolist()])
    assert sorted(most_promising(behind, np.zeros(5), 0.5)[:4]) == [1, 2, 3, 4]


def test_a_retried_trial_is_recorded_once():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=2)
    report(scheduler, "one", 1, 1.0, 1.0)
    scheduler.on_trial_add(None, trial("one"))
    assert report(scheduler, "one", 1, -9.0, -9.0) == TrialScheduler.CONTINUE
    assert len(scheduler._rungs[1]) == 1


def test_rungs_are_rebuilt_from_the_trials_of_a_restored_experiment():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=2)
    done = trial("done")
    done.last_result = {"a": 1.0, "b": 1.0, "drop": 0.0, "training_iteration": 1}
    scheduler.on_trial_add(None, done)
    assert report(scheduler, "new", 1, 0.0, 0.0) == TrialScheduler.STOP


@pytest.mark.parametrize(
    "arguments",
    [{"goal": "accuracy"}, {"grace_period": 0}, {"grace_period": 10}, {"reduction_factor": 1}, {"time_attr": None}],
)
def test_mistakes_are_named(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        ParetoASHAScheduler(**{"goal": GOAL, "max_t": 9, **arguments})


def test_it_is_made_by_name():
    scheduler = tune.create_scheduler("pareto_asha", goal=GOAL, max_t=5)
    assert isinstance(scheduler, ParetoASHAScheduler)


def test_a_trial_stays_while_no_other_feasible_one_is_left():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=4)
    assert report(scheduler, "good", 1, 9.0, 9.0) == TrialScheduler.CONTINUE
    assert report(scheduler, "hidden", 1, 1.0, 1.0) == TrialScheduler.STOP
    scheduler.on_trial_error(None, trial("good"))
    scheduler.on_trial_error(None, trial("good"))
    assert report(scheduler, "last", 1, 1.0, 1.0) == TrialScheduler.CONTINUE
    assert report(scheduler, "good", 2, 9.0, 9.0) == TrialScheduler.CONTINUE
    assert report(scheduler, "surplus", 1, 1.0, 1.0) == TrialScheduler.STOP


def test_known_costs_are_not_waited_for():
    goal = nc.Goal([nc.Objective("a"), nc.Objective("size", "min")], [nc.Constraint("size", "<=", 5)])
    scheduler = ParetoASHAScheduler(
        goal, max_t=9, grace_period=2, reduction_factor=2, cost_model=lambda config: {"size": config["size"]}
    )

    def tell(name, time, size, a):
        return scheduler.on_trial_result(None, trial(name, config={"size": size}), {"a": a, "training_iteration": time})

    assert tell("large", 1, 6, 1.0) == TrialScheduler.STOP
    assert tell("small", 2, 1, 0.5) == TrialScheduler.CONTINUE
    assert tell("dominated", 2, 2, 0.4) == TrialScheduler.STOP
    assert tell("better", 2, 2, 0.9) == TrialScheduler.CONTINUE


def test_what_a_trial_has_measured_counts_in_place_of_a_known_cost():
    goal = nc.Goal([nc.Objective("a")], [nc.Constraint("size", "<=", 5)])
    scheduler = ParetoASHAScheduler(goal, max_t=9, cost_model=lambda config: {"size": 5.1})
    assert scheduler.on_trial_result(None, trial("one"), {"training_iteration": 1, "a": 1}) == TrialScheduler.STOP
    result = {"training_iteration": 1, "a": 1, "size": 4.9}
    assert scheduler.on_trial_result(None, trial("two"), result) == TrialScheduler.CONTINUE


def test_a_network_that_is_not_yet_as_small_as_it_will_be_goes_on():
    goal = nc.Goal([nc.Objective("a")], [nc.Constraint("size", "<=", 5)])
    scheduler = ParetoASHAScheduler(goal, max_t=9, cost_model=lambda config: {"size": 4})
    result = {"training_iteration": 1, "a": 1, "size": 9}
    assert scheduler.on_trial_result(None, trial("one"), result) == TrialScheduler.CONTINUE


def test_only_what_training_may_mend_is_tolerated():
    """Of two constraints, one on what changes while a trial trains and one on what does not."""
    goal = nc.Goal([nc.Objective("a")], [nc.Constraint("drop", "<=", 0.1), nc.Constraint("size", "<=", 1)])
    scheduler = ParetoASHAScheduler(goal, max_t=18, grace_period=2, reduction_factor=3)

    def life(name, a, drop, size):
        for time in (1, 2):
            result = {"a": a, "drop": drop / time, "size": size, "training_iteration": time}
            decision = scheduler.on_trial_result(None, trial(name), result)
        return decision

    for number in range(8):
        life(f"small{number}", 0.5 + number / 100, 0.4 + number / 100, 0.9)
    for number in range(8):
        assert life(f"large{number}", 0.9 + number / 100, 0.4, 1.5) == TrialScheduler.STOP
    assert life("small again", 0.8, 0.4, 0.9) == TrialScheduler.CONTINUE


def test_a_trial_with_nan_is_not_the_only_feasible_one():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=3)
    for number in range(8):
        report(scheduler, f"bad{number}", 1, 1.0, 1.0, drop=0.5)
    assert report(scheduler, "nan", 1, math.nan, 1.0) == TrialScheduler.STOP
    assert report(scheduler, "good", 1, -5.0, -5.0) == TrialScheduler.CONTINUE


def test_metrics_and_progress_that_are_never_reported_are_named_once(caplog):
    goal = nc.Goal([nc.Objective("acuracy")])
    scheduler = ParetoASHAScheduler(goal, max_t=9, time_attr="epoch")
    for name in ("one", "two"):
        scheduler.on_trial_result(None, trial(name), {"accuracy": 1.0, "epoch": 2, "pid": 1})
        scheduler.on_trial_result(None, trial(name), {"accuracy": 1.0})
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    unreported, without_time = (record.getMessage() for record in caplog.records)
    assert "'acuracy'" in unreported
    assert unreported.endswith(": accuracy, epoch"), "and nothing of Tune's own"
    assert "'epoch'" in without_time


def test_a_trial_that_ended_by_itself_counts_after_a_restore_as_before(restored):
    scheduler = ParetoASHAScheduler(GOAL, max_t=100, grace_period=2, reduction_factor=3)
    one = {"a": 9.0, "b": 9.0, "drop": 0.0}
    for time in (1, 2, 3):
        assert scheduler.on_trial_result(None, trial("one"), {**one, "training_iteration": time}) == "CONTINUE"
    scheduler.on_trial_complete(None, trial("one"), {**one, "training_iteration": 3})
    assert report(scheduler, "two", 2, 1.0, 1.0) == TrialScheduler.STOP
    lived = scheduler._feasible, scheduler._stopped

    scheduler = ParetoASHAScheduler(GOAL, max_t=100, grace_period=2, reduction_factor=3)
    scheduler.on_trial_add(None, restored("one", [{**one, "training_iteration": time} for time in (1, 2, 3)]))
    scheduler.on_trial_add(None, restored("two", [{"a": 1.0, "b": 1.0, "drop": 0.0, "training_iteration": 2}]))
    assert (scheduler._feasible, scheduler._stopped) == lived == ({"one"}, {"two"})


def test_a_late_result_enters_only_the_highest_rung_it_reached():
    scheduler = ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=2)
    assert report(scheduler, "late", 5, 1.0, 1.0) == TrialScheduler.CONTINUE
    assert [len(rung) for rung in scheduler._rungs.values()] == [0, 0, 1, 0]


def curve(config):
    for step in range(1, 10):
        tune.report({"a": config["x"] * step, "b": (1 - config["x"]) * step - config["waste"] * step, "drop": 0.0})


def test_a_real_search_stops_dominated_trials_and_keeps_the_front(ray_session, tmp_path):
    tuner = tune.Tuner(
        curve,
        # Pairs of one value of x, the one on the front before the one that it dominates.
        param_space={"x": tune.grid_search([0.5, 0.2, 0.8, 0.35, 0.65]), "waste": tune.grid_search([0.0, 2.0])},
        tune_config=tune.TuneConfig(
            scheduler=ParetoASHAScheduler(GOAL, max_t=9, grace_period=1, reduction_factor=2),
            reuse_actors=True,
            max_concurrent_trials=1,
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="asha", verbose=0),
    )
    grid = tuner.fit()
    lengths = {(r.config["x"], r.config["waste"]): r.metrics["training_iteration"] for r in grid}
    assert len(lengths) == len(grid) == 10
    assert all(length == 1 for (_, waste), length in lengths.items() if waste)
    assert lengths[0.5, 0.0] == 9
    assert lengths[0.8, 0.0] == 4  # Of the two ends of a front the one that came first goes on.
    assert all(length >= 2 for (_, waste), length in lengths.items() if not waste)
    assert not grid.errors


def fragile(config):
    if config["fails"] and not os.path.exists(config["mark"]):
        open(config["mark"], "w").close()
        raise RuntimeError("the machine went away")
    for step in range(1, 10):
        tune.report({"a": config["x"] + step, "b": 1 - config["x"] + step, "drop": 0.0})


def test_a_restored_search_judges_by_what_was_reported_before(ray_session, tmp_path):
    tuner = tune.Tuner(
        fragile,
        param_space={
            "point": tune.grid_search([(0.0, False), (1.0, False), (-1.0, False), (-5.0, True)]),
            "x": tune.sample_from(lambda config: config["point"][0]),
            "fails": tune.sample_from(lambda config: config["point"][1]),
            "mark": str(tmp_path / "mark"),
        },
        tune_config=tune.TuneConfig(
            scheduler=ParetoASHAScheduler(
                nc.Goal([nc.Objective("a")], [nc.Constraint("drop", "<=", 0.1)]),
                max_t=9,
                grace_period=1,
                reduction_factor=2,
            ),
            max_concurrent_trials=1,
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="restored", verbose=0),
    )
    first = tuner.fit()
    assert len(first.errors) == 1
    grid = tune.Tuner.restore(str(tmp_path / "restored"), fragile, restart_errored=True).fit()
    assert not grid.errors
    lengths = {result.config["x"]: result.metrics["training_iteration"] for result in grid}
    # Alone at a fresh scheduler's rung, the restarted trial would have run in full.
    assert lengths == {0.0: 9, 1.0: 9, -1.0: 1, -5.0: 1}
