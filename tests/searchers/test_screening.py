from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_nascomp.pareto import hypervolume
from ray_nascomp.searchers.screening import Screen


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), objectives=st.integers(2, 3))
def test_a_gain_is_the_difference_of_two_hypervolumes(seed, objectives):
    rng = np.random.default_rng(seed)
    losses = np.vstack([np.zeros(objectives), np.ones(objectives), rng.random((8, objectives))])[1:]
    # All objectives reach from 0 to 1, so that the screen's scale is the losses' own.
    losses[1] = 0.0
    losses[1, 0] = 1.0
    losses[2], losses[2, 0] = 1.0, 0.0
    points = rng.uniform(-0.2, 1.3, (12, objectives))
    found = Screen(losses, np.zeros(len(losses))).gains(points, np.zeros(12))
    reference = np.full(objectives, 1.1)
    before = hypervolume(losses, reference)
    for point, gain in zip(points, found, strict=True):
        expected = hypervolume(np.vstack([losses, point]), reference) - before
        assert max(gain, 0.0) == pytest.approx(expected, abs=1e-9)


def test_what_breaks_a_constraint_comes_last_and_less_broken_first():
    screen = Screen(np.array([[0.0, 1.0], [1.0, 0.0]]), np.zeros(2))
    points = np.array([[0.4, 0.4], [2.0, 2.0], [0.1, 0.1], [0.1, 0.1], [np.nan, 0.1]])
    gains = screen.gains(points, np.array([0.0, 0.0, 0.3, 0.1, 0.0]))
    assert gains.argsort()[::-1][:4].tolist() == [0, 1, 4, 3]
    assert gains[0] > 0 > gains[1]
