from __future__ import annotations

import pytest

from ray_nascomp.costs.factor_shapes import Factor, factor_params, factor_shapes, max_useful_rank, ranks_of_conv
from ray_nascomp.errors import ConfigError


def test_a_matrix_becomes_two_and_the_last_holds_the_bias():
    assert factor_shapes((20, 30), "linear", 4, bias=True) == (
        Factor("linear", (4, 30)),
        Factor("linear", (20, 4), bias=True),
    )
    assert factor_shapes((100, 30), "embedding", 4) == (Factor("embedding", (100, 4)), Factor("linear", (30, 4)))
    assert factor_params((20, 30), "linear", 4, bias=True) == 4 * 30 + 20 * 4 + 20


def test_a_convolution_becomes_a_chain_whose_first_factor_runs_at_its_input():
    assert ranks_of_conv(8, 3, 64) == (3, 8)
    first, core, last = factor_shapes((32, 16, 3, 3), "conv", 8, bias=True)
    assert first == Factor("conv", (8, 16, 1, 1), at_input=True)
    assert core == Factor("conv", (8, 8, 3, 3))
    assert last == Factor("conv", (32, 8, 1, 1), bias=True)


def test_a_side_with_all_its_channels_and_a_pointwise_convolution_need_no_third_factor():
    assert [f.weight_shape for f in factor_shapes((64, 3, 5), "conv", 8)] == [(8, 3, 5), (64, 8, 1)]
    assert [f.weight_shape for f in factor_shapes((8, 16, 3), "conv", 10, bias=True)] == [(10, 16, 1), (8, 10, 3)]
    assert factor_shapes((8, 16, 3), "conv", 10, bias=True)[-1].bias
    assert [f.weight_shape for f in factor_shapes((64, 32, 1, 1), "conv", 8)] == [(8, 32, 1, 1), (64, 8, 1, 1)]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((20, 30), "linear"),
        ((500, 16), "embedding"),
        ((32, 16, 3, 3), "conv"),
        ((64, 3, 7, 7), "conv"),
        ((9, 5, 1), "conv"),
    ],
)
def test_the_largest_useful_rank_is_the_last_that_saves_parameters(shape, kind):
    dense = 1
    for side in shape:
        dense *= side
    useful = max_useful_rank(shape, kind)
    assert factor_params(shape, kind, useful) < dense <= factor_params(shape, kind, useful + 1)


def test_a_layer_too_small_to_gain_has_no_useful_rank():
    assert max_useful_rank((2, 2), "linear") == 0


@pytest.mark.parametrize(("rank", "kind"), [(0, "linear"), (21, "linear"), (4, "batch_norm")])
def test_what_has_no_factors_is_refused(rank, kind):
    with pytest.raises(ConfigError):
        factor_shapes((20, 30), kind, rank)
