from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformer_families import FAMILIES, logits, make

from ray_nascomp.architecture import elastic_transformer
from ray_nascomp.architecture.shared_weights import SharedWeights
from ray_nascomp.errors import ConfigError
from ray_nascomp.space import Space


def kernels(architecture: dict[str, Any]) -> nn.Module:
    width, kernel = architecture["width"], architecture["kernel"]
    return nn.Sequential(nn.Conv2d(1, width, kernel), nn.BatchNorm2d(width), nn.Conv2d(width, 4, 1, bias=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sub_network_computes_what_the_built_one_does_and_its_gradients_reach_the_whole(family: str) -> None:
    model, inputs = make(family)
    build, architecture = elastic_transformer(model)
    shared = SharedWeights(model, build)
    rng = np.random.default_rng(1)
    for _ in range(2):
        config = Space({"architecture": architecture}).sample(rng)["architecture"]
        built = build(config)
        network = shared.network(config)
        network._skeleton.eval()
        output = network(**inputs).logits
        torch.testing.assert_close(output.detach(), logits(built, inputs), rtol=0, atol=1e-6)
        model.zero_grad()
        output.square().sum().backward()
        built(**inputs).logits.square().sum().backward()
        reached = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        for name, parameter in built.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(reached[name].norm(), parameter.grad.norm(), rtol=1e-4, atol=1e-3)


def test_leading_channels_and_the_centre_of_kernels_are_shared() -> None:
    model = kernels({"width": 8, "kernel": 5})
    network = SharedWeights(model, kernels).network({"width": 2, "kernel": 3})
    parameters = network.parameters()
    assert torch.equal(parameters["0.weight"], model[0].weight[:2, :, 1:4, 1:4])
    assert torch.equal(parameters["2.weight"], model[2].weight[:, :2])
    network(torch.ones(2, 1, 6, 6)).sum().backward()
    grad = model[0].bias.grad
    assert grad is not None
    assert model[2].weight.grad[:, 2:].count_nonzero() == 0


def test_what_shared_weights_cannot_follow_is_refused() -> None:
    model = kernels({"width": 8, "kernel": 3})
    with pytest.raises(ConfigError, match=r"'0\.weight' of a sub-network is no part"):
        SharedWeights(model, kernels).network({"width": 8, "kernel": 5})

    class Doubling:
        inherits = True

        def __init__(self, of: nn.Module) -> None:
            self.of = of

        def __call__(self, architecture: dict[str, Any]) -> nn.Module:
            network = copy.deepcopy(self.of)
            network[0].weight.data *= 2
            return network

        def with_model(self, of: nn.Module) -> Doubling:
            return Doubling(of)

    shared = SharedWeights(model, Doubling(model))
    with pytest.raises(ConfigError, match=r"no part of one of the model|more than a part"):
        shared.check({}, model)
    with pytest.raises(ConfigError, match=r"has no method with_model"):
        SharedWeights(model, type("Own", (), {"inherits": True})())


def test_elastic_convolutional_networks_share_their_weights() -> None:
    from networks import ResidualNet, with_large_weights

    from ray_nascomp.architecture import elastic_cnn

    model = with_large_weights(ResidualNet())
    inputs = torch.rand(2, 1, 8, 8)
    build, architecture = elastic_cnn(model, inputs, resolutions=(6,))
    shared = SharedWeights(model, build)
    rng = np.random.default_rng(0)
    for _ in range(4):
        config = Space({"architecture": architecture}).sample(rng)["architecture"]
        network = shared.network(config)
        network._skeleton.eval()
        torch.testing.assert_close(network(inputs), build(config).eval()(inputs), rtol=0, atol=1e-6)
        shared.check(config, model)
