from __future__ import annotations

import pickle

import pytest
from ray import tune

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.results import HypervolumeStopper

GOAL = nc.Goal([nc.Objective("a"), nc.Objective("b")], [nc.Constraint("drop", "<=", 0.1)])


def tell(stopper, points, drop=0.0, start=0, **more):
    for number, (a, b) in enumerate(points, start):
        assert stopper(f"trial{number}", {"a": a, "b": b, "drop": drop, **more}) is False
    return stopper.stop_all()


def test_a_search_ends_after_trials_without_growth():
    stopper = HypervolumeStopper(GOAL, patience=3, min_growth=0.0)
    assert not tell(stopper, [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
    assert not tell(stopper, [(0.1, 0.1), (0.2, 0.2)], start=3)
    assert tell(stopper, [(0.3, 0.3)], start=5)
    assert not tell(stopper, [(0.9, 0.9)], start=6)


def test_growth_below_the_limit_counts_as_none():
    # In the box from (1, 1) to (-.1, -.1), the first two dominate 2 * .1 * 1.1 - .1 ** 2 of 1.21: .21.
    # With (.01, .01) it is .21 + .01 ** 2, a growth of 0.05%.
    points = [(0.0, 1.0), (1.0, 0.0), (0.01, 0.01)]
    assert tell(HypervolumeStopper(GOAL, patience=1, min_growth=0.0006), points)
    assert not tell(HypervolumeStopper(GOAL, patience=1, min_growth=0.0004), points)


def test_nothing_ends_before_something_feasible_is_there():
    stopper = HypervolumeStopper(GOAL, patience=2)
    assert not tell(stopper, [(float(i), 0.0) for i in range(9)], drop=0.5)
    assert not tell(stopper, [(1.0, 1.0)], start=9)
    assert tell(stopper, [(0.0, 0.0), (float("nan"), 2.0)], start=10)


def test_only_final_reports_count_and_each_trial_once():
    stopper = HypervolumeStopper(GOAL, patience=1)
    assert not tell(stopper, [(0.0, 0.0)] * 5, final=False)
    for _ in range(5):
        assert not stopper("same", {"a": 1.0, "b": 1.0, "drop": 0.0, "final": True})
    assert not stopper.stop_all()
    assert pickle.loads(pickle.dumps(stopper)).stop_all() is False


@pytest.mark.parametrize("arguments", [{"goal": None}, {"patience": 0}, {"patience": 1.5}, {"min_growth": -1}])
def test_mistakes_are_named(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        HypervolumeStopper(**{"goal": GOAL, **arguments})


def stale(config):
    tune.report({"a": 1.0, "b": 1.0, "drop": 0.0})


def test_a_real_search_ends_early(ray_session, tmp_path):
    tuner = tune.Tuner(
        stale,
        tune_config=tune.TuneConfig(num_samples=40, reuse_actors=True, max_concurrent_trials=1),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path), name="stale", verbose=0, stop=HypervolumeStopper(GOAL, patience=3)
        ),
    )
    assert 4 <= len(tuner.fit()) <= 6
