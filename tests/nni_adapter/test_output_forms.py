from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_nascomp.nni_adapter.output_forms import fitted, hard_steps
from ray_nascomp.nni_adapter.scales import ActivationScale

scales = st.builds(ActivationScale, st.floats(1e-4, 1.0), st.integers(0, 255))


@given(scales, st.sampled_from(["hard_sigmoid", "hard_swish"]))
def test_a_hard_sigmoid_has_whole_steps_between_its_limits(scale, form):
    made = fitted(scale, form)
    steps = hard_steps(made)
    if made == scale:
        return
    assert steps is not None
    assert steps * made.scale == pytest.approx(3)
    assert made.zero_point >= steps
    assert (255 - made.zero_point) * made.scale >= (255 - scale.zero_point) * scale.scale - made.scale
    assert made.zero_point * made.scale >= scale.zero_point * scale.scale - made.scale
    assert made.scale <= max(1.5 * scale.scale, 6 / 127 if form == "hard_sigmoid" else 0)
    again = fitted(made, form)
    assert (again.scale, again.zero_point) == (pytest.approx(made.scale), made.zero_point)


@pytest.mark.parametrize("zero_point", [77, 100, 128, 180])
def test_values_beyond_the_limits_are_multiplied_in_integers(zero_point):
    assert hard_steps(fitted(ActivationScale(0.04, zero_point), "hard_swish")) is not None


def test_of_small_values_a_gate_is_fine_enough_and_hardswish_is_not():
    scale = ActivationScale(0.004, 100)
    assert fitted(scale, "hard_swish") == scale
    assert hard_steps(scale) is None
    assert hard_steps(fitted(scale, "hard_sigmoid")) is not None


@given(scales)
def test_behind_a_relu_all_integers_are_for_positive_values(scale):
    made = fitted(scale, "positive")
    assert made.zero_point == 0
    assert 255 * made.scale == pytest.approx(max(255 - scale.zero_point, 1) * scale.scale)
