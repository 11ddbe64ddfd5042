from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from ray import tune
from ray.tune.experiment import Trial
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
    one = trial(name)
    for time, drop in enumerate(drops, start=1):
        result = {"accuracy": 1 - drop, metric: drop, "training_iteration": time}
        stopped = scheduler.on_trial_result(None, one, result) == TrialScheduler.STOP
        if stopped or time == len(drops):
            scheduler.on_trial_complete(None, one, result)
            return time if stopped else None
    return None


def annealed(start, count=20):
    """Hardly better until the learning rate falls, then a tenth of what it was."""
    return start * np.concatenate([np.linspace(1, 0.95, count - 5), np.linspace(0.8, 0.1, 5)])


def experienced(goal=GOAL, sign=1, metric="drop", count=10):
    """A scheduler that has seen trials run in full, half of them within the bound in the end."""
    scheduler = FeasibilityScheduler(goal, max_t=20)
    for number, start in enumerate(np.linspace(0.01, 0.19, count)):
        assert life(scheduler, sign * annealed(start), f"before{number}", metric) is None
    return scheduler


def test_a_trial_that_stands_where_none_has_come_back_from_is_stopped():
    scheduler = experienced()
    assert life(scheduler, annealed(0.09), "as bad as one that reached it") is None
    assert life(scheduler, annealed(0.5), "far worse") == 3
    assert life(scheduler, np.concatenate([annealed(0.05)[:8], np.full(12, 0.5)]), "worse later") in (9, 10)


def test_nothing_is_stopped_before_ten_trials_have_run_in_full():
    scheduler = experienced(count=9)
    assert life(scheduler, annealed(0.5)[:19], "ended early") is None
    assert life(scheduler, annealed(0.5), "tenth") is None
    assert life(scheduler, annealed(0.5), "eleventh") == 3


def test_a_constraint_from_below_is_the_mirror_image():
    goal = nc.Goal([nc.Objective("accuracy")], [nc.Constraint("gain", ">=", -0.01)])
    for start in (0.09, 0.15, 0.2, 0.5):
        expected = life(experienced(), annealed(start))
        assert life(experienced(goal, -1, "gain"), -annealed(start), metric="gain") == expected


def test_what_fulfils_the_constraint_now_is_never_stopped_for_its_sake():
    assert life(experienced(), np.linspace(0.001, 0.0099, 20)) is None


def test_a_plan_that_cannot_be_carried_out_ends_at_once():
    for said in (False, np.False_, 0):
        result = {"drop": 0.0, "feasible": said, "training_iteration": 1}
        assert FeasibilityScheduler(GOAL, max_t=9).on_trial_result(None, trial(), result) == TrialScheduler.STOP


def test_broken_reports_are_passed_over():
    scheduler = experienced()
    for result in ({}, {"drop": math.nan, "training_iteration": 1}, {"drop": 0.5}, {"training_iteration": 0}):
        assert scheduler.on_trial_result(None, trial(), result) == TrialScheduler.CONTINUE
    assert life(scheduler, [math.nan, 0.5, math.nan, 0.5, 0.5, 0.5]) == 5
    assert life(scheduler, [math.nan] * 20, "nothing") is None
    assert life(scheduler, annealed(0.5), "next") == 3


def rows(drops, first=1):
    return [{"drop": drop, "training_iteration": time} for time, drop in enumerate(drops, start=first)]


def test_curves_are_rebuilt_after_a_restore(restored):
    scheduler = FeasibilityScheduler(GOAL, max_t=20)
    for number, start in enumerate(np.linspace(0.01, 0.19, 10)):
        scheduler.on_trial_add(None, restored(f"full{number}", rows(annealed(start))))
    scheduler.on_trial_add(None, restored("one", rows(annealed(0.5)[:2]), Trial.PENDING))
    result = {"drop": 0.49, "training_iteration": 3}
    assert scheduler.on_trial_result(None, trial(), result) == TrialScheduler.STOP


def test_only_what_was_reported_by_then_is_compared(restored):
    """What the others had early is not known, and is not taken for what they had later."""
    scheduler = FeasibilityScheduler(GOAL, max_t=20)
    for number, start in enumerate(np.linspace(0.01, 0.19, 10)):
        scheduler.on_trial_add(None, restored(f"full{number}", rows(annealed(start)[9:], first=10)))
    assert life(scheduler, annealed(0.5)[:8], "early") is None
    assert life(scheduler, annealed(0.5), "later") == 10


def test_a_curve_that_breaks_off_has_no_end():
    scheduler = FeasibilityScheduler(GOAL, max_t=20)
    for number, start in enumerate(np.linspace(0.01, 0.19, 10)):
        assert life(scheduler, [*annealed(start)[:19], math.nan], f"nan{number}") is None
    assert life(scheduler, annealed(0.5), "next") is None


def test_a_trial_that_is_tried_again_keeps_its_curve():
    scheduler = experienced()
    for time in (1, 2):
        result = {"drop": 0.5, "training_iteration": time}
        assert scheduler.on_trial_result(None, trial(), result) == TrialScheduler.CONTINUE
    scheduler.on_trial_error(None, trial())
    scheduler.on_trial_add(None, trial(status=Trial.PENDING))
    assert scheduler.on_trial_result(None, trial(), {"drop": 0.5, "training_iteration": 3}) == TrialScheduler.STOP


def test_what_says_that_it_is_final_has_run_in_full():
    scheduler = FeasibilityScheduler(GOAL, max_t=100)
    for number, start in enumerate(np.linspace(0.01, 0.19, 10)):
        one = trial(f"before{number}")
        for row in rows(annealed(start)):
            row["final"] = row["training_iteration"] == 20
            assert scheduler.on_trial_result(None, one, row) == TrialScheduler.CONTINUE
        scheduler.on_trial_complete(None, one, row)
    assert life(scheduler, annealed(0.5), "next") == 3


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
    scheduler = FeasibilityScheduler(GOAL, max_t=20)
    reached = stopped_wrongly = missed = epochs = 0
    for number in range(300):
        start = rng.uniform(0, 0.4)
        curve = annealed(start) * rng.uniform(0.7, 1.3) + 0.02 * start * rng.standard_normal(20)
        end = life(scheduler, curve, f"t{number}")
        if curve[-1] <= 0.01:
            reached += 1
            stopped_wrongly += end is not None
        else:
            missed += 1
            epochs += end or 20
    assert stopped_wrongly <= 0.05 * reached
    assert epochs < 0.5 * 20 * missed


def test_probabilities_by_symmetry_and_scale():
    seen, ends = np.array([0.5, 0.4, 0.3, 0.1]), np.array([0.2, 0.12, 0.11, 0.02])
    below = probability_below(0.35, seen, ends, 0.1)
    assert 0.0 < below < 1.0
    assert probability_below(-0.35, -seen, -ends, -0.1) == pytest.approx(1 - below)
    assert probability_below(3.5e3, 1e4 * seen, ends, 0.1) == pytest.approx(below)
    assert probability_below(0.35, seen, 1e4 * ends, 1e3) == pytest.approx(below)
    assert probability_below(0.6, seen, ends, 0.1) < below < probability_below(0.1, seen, ends, 0.1)
    assert probability_below(0.35, seen, ends, 0.05) < below < probability_below(0.35, seen, ends, 0.2)
    assert probability_below(0.3, np.full(3, 0.3), np.full(3, 0.2), 0.1) < 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        {"goal": nc.Goal([nc.Objective("a")])},
        {"max_t": 0},
        {"scheduler": "asha"},
        {"grace_period": 1},
        {"confidence": 1.0},
        {"time_attr": ""},
    ],
)
def test_mistakes_are_named(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        FeasibilityScheduler(**{"goal": GOAL, "max_t": 9, **arguments})


def test_it_is_made_by_name():
    assert isinstance(tune.create_scheduler("feasibility", goal=GOAL, max_t=5), FeasibilityScheduler)
