from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ray_nascomp.compression.observe import observe_inputs, shared_inputs
from ray_nascomp.compression.rounding import (
    affine_range,
    channel_scales,
    error_spread,
    round_affine,
    round_compensated,
    round_nearest,
)
from ray_nascomp.compression.smooth import Scale, smooth
from ray_nascomp.compression.static import quantize_linear
from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.qdq import insert_quantization
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.errors import ConfigError

FEATURES = 48


class Block(nn.Module):
    """Three layers that read one tensor, one that reads another; some features are far larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.out = nn.Linear(FEATURES, 10)
        factors = torch.ones(FEATURES)
        factors[[3, 11, 30]] = 40.0
        self.register_buffer("factors", factors)

    def forward(self, hidden, attention_mask):
        hidden = hidden * self.factors
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2) / 100
        scores = scores.masked_fill(attention_mask[:, None] == 0, -1e9)
        mixed = torch.tanh(torch.softmax(scores, -1) @ self.value(hidden))
        return self.out(mixed.to(self.out.weight.dtype))  # As T5 does.


LAYERS = ("query", "key", "value", "out")


@pytest.fixture
def block():
    torch.manual_seed(0)
    network = Block().eval()
    for name in LAYERS[:3]:
        network.get_submodule(name).weight.data[:, [3, 11, 30]] /= 10
    return network


def batches(count=6, padding=0.0):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        hidden = torch.randn(4, 12, FEATURES, generator=generator)
        mask = torch.ones(4, 12, dtype=torch.long)
        mask[:2, 7:] = 0
        hidden[mask == 0] += padding
        found.append({"hidden": hidden, "attention_mask": mask})
    return found


def test_a_smoothed_network_is_the_same_network(block):
    inputs = batches(1)[0]
    with torch.no_grad():
        expected = block(**inputs)
        renamed = smooth(block, LAYERS, batches())
        found = block(**inputs)
    assert renamed == {name: f"{name}.1" for name in LAYERS}
    assert isinstance(block.query[0], Scale)
    assert isinstance(block.get_submodule("query.1"), nn.Linear)
    assert (found - expected).abs().max() < 1e-5


def test_layers_that_read_one_tensor_are_smoothed_alike(block):
    assert shared_inputs(block, LAYERS, batches(1)[0]) == [["query", "key", "value"], ["out"]]
    smooth(block, LAYERS, batches())
    assert torch.equal(block.query[0].factor, block.value[0].factor)
    # s = max|x|^.8 / max|w|^.2 grows with a feature's outliers; the factor is 1/s.
    factor = block.query[0].factor
    assert factor[[3, 11, 30]].max() < 0.3 * factor[[0, 1, 2]].min()


def test_the_scales_are_those_of_the_paper(block):
    inputs = [batch["hidden"][batch["attention_mask"].bool()] * block.factors for batch in batches()]
    largest = torch.cat(inputs).abs().amax(0)
    weights = torch.stack([block.get_submodule(name).weight.detach().abs().amax(0) for name in LAYERS[:3]]).amax(0)
    scales = largest**0.6 / weights**0.4
    smooth(block, LAYERS[:3], batches(), alpha=0.6)
    ratio = 1 / (block.key[0].factor * scales)
    assert ratio.std() / ratio.mean() < 1e-5


def test_padding_is_not_observed(block):
    plain, padded = (next(observe_inputs(block, [["query"]], batches(padding=shift))) for shift in (0.0, 1e4))
    assert plain.count == padded.count == 6 * (4 * 12 - 2 * 5)
    assert torch.equal(plain.highest, padded.highest)
    assert torch.allclose(plain.covariance, padded.covariance)
    assert len(plain.rows) == plain.count


def test_a_weight_that_is_shared_is_left_alone():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = embedding.weight
    network = nn.Sequential(embedding, nn.Linear(8, 8), nn.Tanh(), head).eval()
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = network(ids)
        assert smooth(network, ["1", "3"], [ids]) == {"1": "1.1"}
        assert (network(ids) - expected).abs().max() < 1e-5


def test_what_cannot_be_smoothed_is_refused(block):
    with pytest.raises(ConfigError, match="Block"):
        smooth(block, [""], batches())
    with pytest.raises(ConfigError, match=r"1\.5"):
        smooth(block, LAYERS, batches(), alpha=1.5)
    with pytest.raises(ConfigError, match="batches"):
        smooth(block, LAYERS, [])


def test_zero_is_among_the_values_of_a_range():
    scale, zero = affine_range(-1.0, 3.0)
    assert scale == pytest.approx(4 / 255)
    assert zero == 64
    assert affine_range(0.5, 2.0) == (pytest.approx(2 / 255), 0)
    values = torch.tensor([-2.0, 0.0, 1.0, 9.0])
    assert torch.allclose(round_affine(values, scale, zero), torch.tensor([-64.0, 0.0, 64.0, 191.0]) * scale)


@pytest.mark.parametrize("limit", [7, 63])
def test_compensated_rounding_leaves_a_fraction_of_the_error(limit):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator)
    inputs = torch.randn(2000, 64, generator=generator) @ (mixing * torch.logspace(0, -2, 64)[:, None])
    weight = torch.randn(32, 64, generator=generator)
    scales = channel_scales(weight, limit)
    covariance = (inputs.T @ inputs / len(inputs)).double()[None]
    exact = inputs @ weight.T
    nearest = round_nearest(weight, scales, limit)
    compensated = round_compensated(weight, scales, limit, error_spread(covariance))
    integers = (compensated / scales[:, None]).numpy()
    assert np.abs(integers - integers.round()).max() < 1e-3
    assert np.abs(integers).max() < limit + 0.5
    errors = [float((inputs @ rounded.T - exact).square().mean()) for rounded in (nearest, compensated)]
    assert errors[1] < 0.5 * errors[0]


def test_the_file_of_a_quantized_network_is_what_its_scales_say(block):
    exact = copy.deepcopy(block)
    renamed, calibration = quantize_linear(block, LAYERS, batches())
    assert set(calibration) == set(renamed.values())
    inputs = batches(1)[0]
    names = tuple(inputs)
    weights = {name: block.get_submodule(name).weight.detach().numpy() for name in calibration}
    example = {name: tensor[:2] for name, tensor in inputs.items()}
    found = insert_quantization(export_onnx(block, example, names), weights, calibration)
    file = run_session(make_session(compact(found)), inputs, names)
    for name, scales in calibration.items():
        values = scales.integers(weights[name]) * scales.weight[:, None]
        assert np.abs(values - weights[name]).max() < 1e-5
        step = scales.input
        block.get_submodule(name).register_forward_pre_hook(
            lambda _module, arguments, step=step: round_affine(arguments[0], step.scale, step.zero_point)
        )
    with torch.no_grad():
        simulated = block(**inputs).numpy()
        expected = exact(**inputs).numpy()
    mask = inputs["attention_mask"].bool().numpy()
    assert np.abs(file - simulated)[mask].max() < 2e-3
    error = np.linalg.norm((file - expected)[mask]) / np.linalg.norm(expected[mask])
    assert 0 < error < 0.03
