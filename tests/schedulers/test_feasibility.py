from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.schedulers import FeasibilityScheduler, ParetoASHAScheduler
from ray_nascomp.schedulers.learning_curve import probability_below

GOAL = nc.Goal([nc.Objective("accuracy")], [nc.Constraint("drop", "<=", 0.01)])


def trial(name="one", **attributes):
    return SimpleNamespace(**{"trial_id": name, "last_result": {}, "storage": None, "config": {}, **attributes})


def life(scheduler, drops, name="one", metric="drop"):
    """Reports until the trial is stopped; how many it took, None if it was not."""
    for time, drop in enumerate(drops, start=1):
        result = {"accuracy": 1 - drop, metric: drop, "training_iteration": time}
        if scheduler.on_trial_result(None, trial(name), result) == TrialScheduler.STOP:
            return time
    return None


def power_law(end, slope, decay, count=20):
    return end + slope * np.arange(1.0, count + 1) ** -decay


def test_a_trial_on_its_way_to_the_bound_goes_on_and_a_flat_one_stops():
    scheduler = FeasibilityScheduler(GOAL, max_t=20)
    assert life(scheduler, power_law(-0.01, 0.3, 1.0)) is None
    assert life(scheduler, np.full(20, 0.3), "flat") == 3
    assert life(scheduler, power_law(0.1, 0.3, 0.5), "slow") < 6


def test_a_constraint_from_below_is_the_mirror_image():
    goal = nc.Goal([nc.Objective("accuracy")], [nc.Constraint("gain", ">=", -0.01)])
    for curve in (np.full(20, 0.3), power_law(-0.01, 0.3, 1.0), power_law(0.1, 0.3, 0.5)):
        expected = life(FeasibilityScheduler(GOAL, max_t=20), curve)
        assert life(FeasibilityScheduler(goal, max_t=20), -curve, metric="gain") == expected


def test_what_fulfils_the_constraint_now_is_never_stopped_for_its_sake():
    assert life(FeasibilityScheduler(GOAL, max_t=100), [0.001, 0.003, 0.005, 0.007, 0.009]) is None


def test_a_plan_that_cannot_be_carried_out_ends_at_once():
    result = {"drop": 0.0, "feasible": False, "training_iteration": 1}
    assert FeasibilityScheduler(GOAL, max_t=9).on_trial_result(None, trial(), result) == TrialScheduler.STOP


def test_broken_reports_are_passed_over():
    scheduler = FeasibilityScheduler(GOAL, max_t=20)
    for result in ({}, {"drop": math.nan, "training_iteration": 1}, {"drop": 0.5}, {"training_iteration": 0}):
        assert scheduler.on_trial_result(None, trial(), result) == TrialScheduler.CONTINUE
    assert life(scheduler, [math.nan, 0.3, math.nan, 0.3, 0.3]) == 5


def test_curves_are_rebuilt_after_a_restore():
    scheduler = FeasibilityScheduler(GOAL, max_t=20, grace_period=2)
    scheduler.on_trial_add(None, trial(last_result={"drop": 0.3, "training_iteration": 4}))
    result = {"drop": 0.3, "training_iteration": 5}
    assert scheduler.on_trial_result(None, trial(), result) == TrialScheduler.STOP


def test_the_other_scheduler_hears_everything_and_decides_first():
    other = ParetoASHAScheduler(GOAL, max_t=20, grace_period=1, reduction_factor=2)
    scheduler = FeasibilityScheduler(GOAL, 20, other)
    assert scheduler.metric is None
    assert life(scheduler, [0.0], "first") is None
    assert life(scheduler, [0.2], "second") == 1
    assert len(other._rungs[1]) == 2
    assert "ParetoASHA: 1 trials stopped" in scheduler.debug_string()
    single = FeasibilityScheduler(GOAL, 20, ASHAScheduler(max_t=20))
    assert single.set_search_properties("accuracy", "max")
    assert single.metric == "accuracy"


def test_of_curves_that_reach_the_bound_few_are_stopped_and_the_others_early():
    rng = np.random.default_rng(0)
    times = np.arange(1.0, 21.0)
    reached = stopped_wrongly = missed = epochs = 0
    for _ in range(300):
        decay, delay = rng.choice([0.3, 0.7, 1.0, 1.5, 2.5]), rng.uniform(0, 2)
        curve = rng.uniform(-0.03, 0.06) + rng.uniform(0.05, 0.6) * (times + delay) ** -decay
        curve += 0.002 * rng.standard_normal(20)
        end = life(FeasibilityScheduler(GOAL, max_t=20), curve)
        if curve[-1] <= 0.01:
            reached += 1
            stopped_wrongly += end is not None
        else:
            missed += 1
            epochs += end or 20
    assert stopped_wrongly <= 0.1 * reached
    assert epochs < 0.5 * 20 * missed


def test_probabilities_by_symmetry_and_scale():
    times, values = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.4, 0.35])
    below = probability_below(times, values, 9.0, 0.3)
    assert 0.0 < below < 1.0
    assert probability_below(times, -values, 9.0, -0.3) == pytest.approx(1 - below)
    assert probability_below(times, 1e4 * values, 9.0, 3e3) == pytest.approx(below)
    assert probability_below(times, values, 9.0, 0.2) < below < probability_below(times, values, 9.0, 0.34)


@pytest.mark.parametrize(
    "arguments",
    [
        {"goal": nc.Goal([nc.Objective("a")])},
        {"max_t": 0},
        {"scheduler": "asha"},
        {"grace_period": 1},
        {"confidence": 1.0},
    ],
)
def test_mistakes_are_named(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        FeasibilityScheduler(**{"goal": GOAL, "max_t": 9, **arguments})


def test_it_is_made_by_name():
    assert isinstance(tune.create_scheduler("feasibility", goal=GOAL, max_t=5), FeasibilityScheduler)
