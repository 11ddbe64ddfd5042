from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_nascomp.searchers.process import ProcessSurrogate
from ray_nascomp.searchers.process_shape import choose_shapes
from ray_nascomp.searchers.warping import Warp


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), strength=st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0, 8.0]))
def test_a_warp_keeps_order_and_comes_back(seed, strength):
    values = np.random.default_rng(seed).standard_t(2, 50)
    warp = Warp(values, strength)
    warped = warp(values)
    assert (np.argsort(warped) == np.argsort(values)).all()
    assert warped.mean() == pytest.approx(0, abs=1e-9)
    assert warped.std() == pytest.approx(1)
    assert np.allclose(warp.inverse(warped), values)
    step = 1e-6
    slopes = (warp(values + step) - warp(values - step)) / (2 * step)
    assert warp.log_slope(values) == pytest.approx(np.log(slopes).sum(), abs=1e-3)


def test_no_draw_lies_far_beyond_what_was_seen():
    values = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    assert Warp(values, 0.0).inverse(np.array([-50.0, 50.0])) == pytest.approx([0 - 2**0.5, 4 + 2**0.5])


def test_equal_values_stay_what_they_are():
    assert Warp(np.full(6, 3.0), 2.0).inverse(np.array([-1.0, 0.0, 1.0])) == pytest.approx([3.0] * 3)


def _broken_networks(rng, count):
    """Smooth accuracies, but for the tenth that fall to chance."""
    inputs = rng.random((count, 5))
    accuracies = 0.9 + 0.04 * inputs @ np.array([1.0, 0.5, -0.5, 0.3, -1.0])
    accuracies[inputs[:, 0] < 0.1] = 0.1
    return inputs, accuracies[:, None]


def test_outliers_choose_a_warp_and_smooth_results_none():
    inputs, accuracies = _broken_networks(np.random.default_rng(0), 80)
    smooth = inputs @ np.arange(5.0)
    warped, plain = choose_shapes(inputs, np.stack([accuracies[:, 0], smooth], axis=1))
    assert warped.strength >= 1
    assert plain.strength <= 0.5


def test_a_warped_process_ranks_what_outliers_would_hide():
    rng = np.random.default_rng(1)
    inputs, accuracies = _broken_networks(rng, 60)
    queries, truth = _broken_networks(rng, 400)
    sound = truth[:, 0] > 0.5
    (shape,) = choose_shapes(inputs, accuracies)

    def ranked(strength):
        surrogate = ProcessSurrogate(inputs, accuracies, [shape._replace(strength=strength)])
        draws = surrogate.sample(np.random.default_rng(0), queries[sound], 64)
        assert draws.shape == (64, sound.sum(), 1)
        places = [np.argsort(np.argsort(values)) for values in (np.median(draws, axis=0)[:, 0], truth[sound, 0])]
        return np.corrcoef(places)[0, 1]

    assert ranked(shape.strength) > ranked(0.0) + 0.05


def test_a_process_learns_which_inputs_matter():
    rng = np.random.default_rng(2)
    inputs, queries = rng.random((60, 12)), rng.random((300, 12))

    def truth(rows):
        return (np.sin(6 * rows[:, 0]) + 2 * rows[:, 1] ** 2)[:, None]

    (shape,) = choose_shapes(inputs, truth(inputs))
    relevance = shape.trends + 1 / shape.lengths**2
    assert set(np.argsort(-relevance)[:2]) == {0, 1}
    alike = shape._replace(lengths=np.full(12, np.median(shape.lengths)), trends=np.full(12, np.median(shape.trends)))

    def error(used):
        predicted = ProcessSurrogate(inputs, truth(inputs), [used]).quantiles(rng, queries, 8).mean(axis=0)
        return np.sqrt(np.mean((predicted - truth(queries)) ** 2))

    assert error(shape) < 0.6 * error(alike)


def test_quantiles_are_what_many_samples_say():
    rng = np.random.default_rng(3)
    inputs = rng.random((40, 4))
    targets = np.stack([inputs.sum(axis=1), np.exp(3 * inputs[:, 0])], axis=1)
    surrogate, queries = ProcessSurrogate(inputs, targets, choose_shapes(inputs, targets)), rng.random((20, 4))
    few, many = surrogate.quantiles(rng, queries, 8), surrogate.sample(rng, queries, 20_000)
    assert few.shape == (8, 20, 2)
    assert np.allclose(few.mean(axis=0), many.mean(axis=0), atol=0.05 * targets.std(axis=0))
    assert np.allclose(few.std(axis=0), many.std(axis=0), rtol=0.2, atol=0.01 * targets.std(axis=0))
