from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ray_nascomp import Constraint, Goal, Objective
from ray_nascomp.pareto import best_first, front_indices, hypervolume, knee_index, normalised_hypervolume, ranks

GOAL = Goal([Objective("a"), Objective("b", "min")], [Constraint("c", "<=", 1.0)])


def test_front_holds_feasible_non_dominated_results_once():
    results = [
        {"a": 1.0, "b": 1.0, "c": 0.0},
        {"a": 2.0, "b": 2.0, "c": 0.0},
        {"a": 1.0, "b": 3.0, "c": 0.0},
        {"a": 9.0, "b": 0.0, "c": 5.0},
        {"a": float("nan"), "b": 0.0, "c": 0.0},
        {"a": 1.0, "b": 1.0, "c": 0.0},
    ]
    assert front_indices(GOAL, results) == [0, 1]
    assert front_indices(GOAL, results[3:5]) == []


def test_hypervolume_of_two_boxes():
    points = np.array([[0.0, 2.0], [1.0, 0.0], [5.0, 5.0], [np.nan, 0.0]])
    assert hypervolume(points, np.array([3.0, 3.0])) == pytest.approx(3 * 1 + 2 * 2)
    assert hypervolume(np.zeros((0, 2)), np.array([1.0, 1.0])) == 0


def test_normalised_hypervolume_is_a_share_of_the_box():
    ideal, nadir = np.array([0.0, 10.0]), np.array([2.0, 20.0])
    assert normalised_hypervolume(np.array([[0.0, 10.0]]), ideal, nadir) == pytest.approx(1.0)
    assert normalised_hypervolume(np.array([[1.0, 15.0]]), ideal, nadir) == pytest.approx(0.25)


def test_ranks_put_infeasible_rows_last_by_violation():
    losses = np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0], [-2.0, -2.0], [np.nan, 0.0]])
    assert ranks(losses, np.array([0.0, 0.0, 2.0, 1.0, 0.0])).tolist() == [0, 1, 3, 2, 4]


def test_best_first_goes_by_rank_then_by_room_then_by_violation():
    front = [[0.0, 1.0], [0.02, 0.98], [0.5, 0.5], [1.0, 0.0]]
    losses = np.array([[np.nan, 0.0], [2.0, 2.0], *front, [-1.0, -1.0]])
    violations = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1])
    assert best_first(losses, violations).tolist() == [2, 5, 4, 3, 1, 6, 0]


@given(arrays.arrays(float, st.tuples(st.integers(1, 12), st.just(3)), elements=st.integers(0, 4).map(float)))
def test_rank_zero_is_the_front_and_dominated_rows_rank_later(losses):
    found = ranks(losses, np.zeros(len(losses)))
    for i, row in enumerate(losses):
        dominators = (losses <= row).all(axis=1) & (losses < row).any(axis=1)
        assert (found[i] == 0) == (not dominators.any())
        assert (found[dominators] < found[i]).all()


def test_knee_is_nearest_to_the_ideal_corner():
    assert knee_index(np.array([[0.0, 100.0], [0.2, 10.0], [1.0, 0.0]])) == 1
