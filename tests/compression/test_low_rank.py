from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ray_nascomp.compression.low_rank import (
    Factorised,
    factorisable_layers,
    factorise,
    input_covariances,
    rank_for_energy,
    spectra,
)
from ray_nascomp.compression.smooth import Scale
from ray_nascomp.costs.factor_shapes import factor_params, factor_shapes, max_rank, ranks_of_conv
from ray_nascomp.errors import ConfigError


def dense_weight(layer):
    return layer.dense_weight() if isinstance(layer, Factorised) else layer.weight


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in a network, with weights that do not depend on torch's global generator."""
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator(seed)))
    return nn.Sequential(layer).eval()


LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), lambda: torch.randn(6, 12, generator=generator())),
    "embedding": (lambda: nn.Embedding(40, 12, padding_idx=3), lambda: torch.arange(40)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 15, generator=generator())),
    "conv2d": (
        lambda: nn.Conv2d(10, 6, (3, 5), stride=(2, 1), padding=2, dilation=(1, 2), padding_mode="reflect"),
        lambda: torch.randn(2, 10, 9, 11, generator=generator()),
    ),
    "pointwise": (
        lambda: nn.Conv2d(6, 10, 1, stride=2, padding=1),
        lambda: torch.randn(2, 6, 8, 8, generator=generator()),
    ),
    "stem": (lambda: nn.Conv2d(1, 8, 3, bias=False), lambda: torch.randn(2, 1, 8, 8, generator=generator())),
}


def test_the_type_of_a_layer_whose_last_factor_is_smoothed_can_be_asked_for():
    layer = Factorised(nn.Linear(8, 6), [nn.Linear(8, 2, bias=False), nn.Linear(2, 6)])
    layer[1] = nn.Sequential(Scale(torch.ones(2)), layer[1])
    assert layer.weight is layer[1][1].weight


@pytest.mark.parametrize("kind", LAYERS)
def test_full_rank_is_the_original(kind):
    make, inputs = LAYERS[kind]
    network = randomised(make())
    expected = network(inputs())
    layer = network[0]
    full = max_rank(layer.weight.shape, factorisable_layers(network)["0"])
    assert factorise(network, {"0": full})["0"][0] == "0.0"
    assert (network(inputs()) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.allclose(dense_weight(network[0]), layer.weight, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_weight_that_is_reported_is_the_one_that_acts(kind):
    make, inputs = LAYERS[kind]
    network = randomised(make())
    dense = copy.deepcopy(network)
    factorise(network, {"0": 3})
    with torch.no_grad():
        dense[0].weight.copy_(dense_weight(network[0]))
    assert torch.allclose(network(inputs()), dense(inputs()), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["linear", "embedding", "conv"]), st.tuples(*[st.integers(1, 9)] * 4), st.booleans(), st.data())
def test_parameters_are_those_of_the_shape_functions(kind, sizes, bias, data):
    first, second, *kernel = sizes
    layer = {
        "linear": lambda: nn.Linear(second, first, bias=bias),
        "embedding": lambda: nn.Embedding(first, second),
        "conv": lambda: nn.Conv2d(second, first, tuple(kernel), bias=bias),
    }[kind]()
    rank = data.draw(st.integers(1, max_rank(layer.weight.shape, kind)))
    bias = bias and kind != "embedding"
    network = randomised(layer)
    names = factorise(network, {"0": rank})["0"]
    made = [network.get_submodule(name) for name in names]
    expected = factor_shapes(layer.weight.shape, kind, rank, bias)
    assert [tuple(module.weight.shape) for module in made] == [factor.weight_shape for factor in expected]
    assert sum(parameter.numel() for parameter in network.parameters()) == factor_params(
        layer.weight.shape, kind, rank, bias
    )


def test_plain_svd_is_as_good_as_numpys():
    for kind in ("linear", "embedding", "pointwise"):
        network = randomised(LAYERS[kind][0]())
        weight = dense_weight(network[0]).detach().flatten(1).numpy()
        factorise(network, {"0": 4})
        error = np.linalg.norm(dense_weight(network[0]).detach().flatten(1).numpy() - weight)
        best = np.linalg.norm(np.linalg.svd(weight, compute_uv=False)[4:])
        assert error == pytest.approx(best, rel=1e-5)


def test_tucker_is_as_good_as_a_reference_in_numpy():
    network = randomised(nn.Conv2d(10, 14, 3))
    weight = dense_weight(network[0]).detach().double().numpy()
    ranks = dict(zip((1, 0), ranks_of_conv(4, 10, 14), strict=True))

    def basis(tensor: np.ndarray, side: int) -> np.ndarray:
        return np.linalg.svd(np.moveaxis(tensor, side, 0).reshape(tensor.shape[side], -1))[0][:, : ranks[side]]

    def project(tensor: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
        return np.moveaxis(np.tensordot(tensor, matrix, (side, 0)), -1, side)

    bases = {side: basis(weight, side) for side in (0, 1)}
    for _ in range(2):
        for side in (0, 1):
            bases[side] = basis(project(weight, bases[1 - side], 1 - side), side)
    core = project(project(weight, bases[0], 0), bases[1], 1)
    expected = np.sqrt(np.sum(weight**2) - np.sum(core**2))
    factorise(network, {"0": 4})
    assert np.linalg.norm(dense_weight(network[0]).detach().numpy() - weight) == pytest.approx(expected, rel=1e-5)


def correlated(samples: int, seed: int) -> torch.Tensor:
    """Inputs that mostly lie in few directions, in sequences of two positions."""
    mixing = torch.randn(12, 12, generator=generator(5)) * torch.logspace(0, -2, 12)[:, None]
    return (torch.randn(samples, 2, 12, generator=generator(seed)) @ mixing).float()


def test_whitening_loses_less_of_what_correlated_inputs_give():
    network = randomised(nn.Linear(12, 20))
    inputs = correlated(500, 1)
    covariances = input_covariances(network, ["0"], [(inputs[:300], None), (inputs[300:], None)])
    rows = inputs.double().reshape(-1, 12)
    assert torch.allclose(covariances["0"], rows.T @ rows / 1000, atol=1e-5)
    unseen = correlated(500, 2)
    expected = network(unseen)
    plain, whitened = copy.deepcopy(network), copy.deepcopy(network)
    factorise(plain, {"0": 4})
    factorise(whitened, {"0": 4}, covariances)
    errors = [(smaller(unseen) - expected).norm() / expected.norm() for smaller in (plain, whitened)]
    assert errors[1] < 0.5 * errors[0]
    weight, root = dense_weight(network[0]).detach().double().numpy(), np.linalg.cholesky(covariances["0"].numpy())
    best = np.linalg.norm(np.linalg.svd(weight @ root, compute_uv=False)[4:])
    difference = whitened[0].dense_weight().detach().double().numpy() - weight
    assert np.linalg.norm(difference @ root) == pytest.approx(best, rel=0.02)


def test_an_embedding_is_truest_to_frequent_tokens():
    network = randomised(nn.Embedding(40, 12))
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3], [1, 2, 3, 0, 0, 0]])
    covariances = input_covariances(network, ["0"], [(tokens, None)])
    assert covariances["0"][:5].tolist() == [3 / 12, 3 / 12, 3 / 12, 3 / 12, 0]
    expected = network(tokens)
    plain, weighed = copy.deepcopy(network), copy.deepcopy(network)
    factorise(plain, {"0": 6})
    factorise(weighed, {"0": 6}, covariances)
    errors = [(smaller(tokens) - expected).norm() for smaller in (plain, weighed)]
    assert errors[1] < 0.5 * errors[0]
    assert spectra(network, ["0"], covariances)["0"].shape == (12,)


def test_whitened_full_rank_is_the_original_even_for_inputs_that_never_vary():
    network = randomised(nn.Linear(12, 20))
    inputs = correlated(4, 1)
    inputs[..., 3:] = 0
    expected = network(correlated(50, 3))
    factorise(network, {"0": 12}, input_covariances(network, ["0"], [(inputs, None)]))
    assert (network(correlated(50, 3)) - expected).abs().max() < 1e-4


def test_hidden_positions_count_for_nothing_and_uncalled_layers_are_absent():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.used(values)

    values = torch.randn(2, 4, 3, generator=generator())
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    found = input_covariances(Masked(), ["used", "unused"], [({"values": values, "attention_mask": mask}, None)])
    rows = torch.stack([values[0, 0], values[0, 1], values[1, 0]]).double()
    assert list(found) == ["used"]
    assert torch.allclose(found["used"], rows.T @ rows / 3, atol=1e-5)


def test_rank_follows_the_energy_that_is_kept():
    assert rank_for_energy(np.array([3.0, 2.0, 1.0]), 9 / 14) == 1
    assert rank_for_energy(np.array([3.0, 2.0, 1.0]), 0.65) == 2
    assert rank_for_energy(np.array([3.0, 2.0, 1.0]), 1.0) == 3
    with pytest.raises(ConfigError, match="energy"):
        rank_for_energy(np.array([1.0]), 0.0)


def test_spectra_tell_the_error_before_it_is_made():
    network = randomised(nn.Linear(12, 20))
    covariance = {"0": input_covariances(network, ["0"], [(correlated(300, 1), None)])["0"]}
    values = spectra(network, ["0"], covariance)["0"]
    weight = dense_weight(network[0]).detach().double()
    root = torch.linalg.cholesky(covariance["0"])
    # The ridge shows in the smallest values.
    assert values[:6] == pytest.approx(torch.linalg.svdvals(weight @ root).numpy()[:6], rel=0.02)
    assert np.linalg.norm(spectra(network, ["0"])["0"]) == pytest.approx(weight.norm().item())


def test_a_convolutions_spectrum_bounds_its_error():
    network = randomised(nn.Conv2d(10, 14, 3))
    weight = dense_weight(network[0]).detach().clone()
    values = spectra(network, ["0"])["0"]
    assert len(values) == 14
    factorise(network, {"0": 4})
    assert (dense_weight(network[0]) - weight).norm().item() <= np.linalg.norm(values[4:])


def test_layers_that_are_more_than_their_call_are_left_out():
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.embedding = nn.Embedding(10, 8)
            self.tied = nn.Linear(8, 10, bias=False)
            self.tied.weight = self.embedding.weight
            self.twice = nn.Linear(8, 8)
            self.again = self.twice
            self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
            self.normalised = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.renormed = nn.Embedding(10, 8, max_norm=1.0)
            self.plain = nn.Linear(8, 8)
            self.conv = nn.Conv2d(3, 8, 3)

    assert factorisable_layers(Awkward()) == {"plain": "linear", "conv": "conv"}


def test_unknown_layers_and_ranks_out_of_range_are_refused_before_anything_changes():
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ConfigError, match=r"low_rank\.1.*9.*1 to 8"):
        factorise(network, {"0": 4, "1": 9})
    with pytest.raises(ConfigError, match="nowhere"):
        factorise(network, {"nowhere": 4})
    assert type(network[0]) is nn.Linear


def test_frozen_weights_the_padding_token_and_torchs_generator_stay_as_they_are():
    network = randomised(nn.Embedding(40, 12, padding_idx=3))
    dense_weight(network[0]).requires_grad_(False)
    with torch.no_grad():
        dense_weight(network[0])[3] = 0
    state = torch.get_rng_state()
    factorise(network, {"0": 5})
    assert torch.equal(torch.get_rng_state(), state)
    assert not network[0][0].weight.requires_grad
    assert network[0].padding_idx == network[0][0].padding_idx == 3
    assert network(torch.tensor([3])).abs().max() < 1e-6
