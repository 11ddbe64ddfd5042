from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_nascomp import Constraint, Goal, Objective
from ray_nascomp.errors import ConfigError, MissingMetricError
from ray_nascomp.goals import WORST_SCORE

GOAL = Goal([Objective("accuracy"), Objective("size_mb", "min")], [Constraint("drop", "<=", 0.02)])
numbers = st.floats(-100, 100)
results = st.fixed_dictionaries({"accuracy": numbers, "size_mb": numbers, "drop": st.sampled_from([0.0, 0.02, 0.05])})


def test_losses_are_minimised_whatever_the_direction():
    assert GOAL.losses({"accuracy": 0.9, "size_mb": 3.0}).tolist() == [-0.9, 3.0]


def test_violation_is_relative_to_the_bound():
    assert GOAL.violation({"drop": 0.03}) == pytest.approx(0.5)
    assert GOAL.violation({"drop": 0.02}) == 0
    assert Constraint("speedup", ">=", 2.0).violation(1.5) == pytest.approx(0.25)
    assert Constraint("drop", "<=", 0.0).violation(0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("broken", [{}, {"drop": math.nan}, {"drop": "0"}, {"drop": 0.0, "feasible": False}])
def test_a_result_without_its_constrained_metric_is_infeasible(broken):
    assert GOAL.violation(broken) == math.inf
    assert not GOAL.is_feasible({"accuracy": 1.0, "size_mb": 1.0, **broken})


def test_feasible_beats_infeasible_and_less_violating_beats_more():
    good = {"accuracy": 0.1, "size_mb": 9.0, "drop": 0.0}
    bad = {"accuracy": 0.9, "size_mb": 1.0, "drop": 0.03}
    worse = {"accuracy": 0.9, "size_mb": 0.1, "drop": 0.04}
    assert GOAL.dominates(good, bad)
    assert GOAL.dominates(bad, worse)
    assert not GOAL.dominates(bad, good)


def test_nan_is_dominated_and_never_dominates():
    nan = {"accuracy": math.nan, "size_mb": 0.0, "drop": 0.0}
    good = {"accuracy": 0.1, "size_mb": 9.0, "drop": 0.0}
    assert GOAL.dominates(good, nan)
    assert not GOAL.dominates(nan, good)
    assert not GOAL.dominates(nan, nan)


@given(results, results, results)
def test_domination_is_a_strict_partial_order(a, b, c):
    assert not GOAL.dominates(a, a)
    assert not (GOAL.dominates(a, b) and GOAL.dominates(b, a))
    if GOAL.dominates(a, b) and GOAL.dominates(b, c):
        assert GOAL.dominates(a, c)


@given(results, results)
def test_score_agrees_with_pareto_domination_among_feasible_results(a, b):
    a, b = {**a, "drop": 0.0}, {**b, "drop": 0.0}
    assert math.isfinite(GOAL.score(a))
    if GOAL.dominates(a, b):
        assert GOAL.score(a) >= GOAL.score(b)


def test_score_falls_with_violation_and_is_finite_without_metrics():
    metrics = {"accuracy": 0.9, "size_mb": 1.0}
    scores = [GOAL.score({**metrics, "drop": drop}) for drop in (0.0, 0.03, 0.05)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    assert GOAL.score({}) == WORST_SCORE


def test_goal_survives_json():
    assert Goal.from_json(GOAL.to_json()) == GOAL


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Objective("accuracy", "maximum"), "'maximum'"),
        (lambda: Constraint("drop", "<", 1), "'<'"),
        (lambda: Constraint("drop", "<=", math.nan), "nan"),
        (lambda: Goal([]), "objectives"),
        (lambda: Goal([Objective("a"), Objective("a", "min")]), "twice"),
        (lambda: Goal(["accuracy"]), "'accuracy'"),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_metric_that_is_not_reported_is_named_with_what_is():
    with pytest.raises(MissingMetricError, match=r"'size_mb'.*reported: accuracy, drop"):
        GOAL.check_reported(["accuracy", "drop"])
