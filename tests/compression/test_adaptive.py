from __future__ import annotations

import math

import pytest
import torch
from networks import SequenceNet

import ray_nascomp as nc
from ray_nascomp.compression.adaptive import adaptive_bits
from ray_nascomp.errors import ConfigError


@pytest.fixture(scope="module")
def task() -> nc.Task:
    torch.manual_seed(0)
    network = SequenceNet().eval()
    inputs = torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        network.head.weight.mul_(50)
        targets = network(inputs).argmax(1)
    return nc.Task(network, (inputs, targets), (inputs, targets))


def test_less_budget_gives_fewer_bits_within_it(task):
    sizes = {layer.name: math.prod(layer.weight_shape) + layer.fixed_params for layer in task.spec.quantizable_layers}
    shares = []
    for budget in (0.5, 0.35, 0.3):
        bits = adaptive_bits(task, "ptq", budget)
        assert set(bits) == {"conv.0", "rnn", "hidden", "head"}
        assert bits["rnn"] in (8, 32)
        shares.append(sum(sizes[name] * value / 32 for name, value in bits.items()) / sum(sizes.values()))
        assert shares[-1] <= budget
    assert shares == sorted(shares, reverse=True)


def test_with_the_whole_budget_everything_stays_in_floating_point(task):
    assert set(adaptive_bits(task, "ptq", 1.0).values()) == {32}


def test_a_budget_below_all_bits_is_refused(task):
    with pytest.raises(ConfigError, match=r"0\.05 was given, the least that all layers can cost is 0\.178"):
        adaptive_bits(task, "ptq", 0.05)
