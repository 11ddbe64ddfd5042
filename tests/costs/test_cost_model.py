from __future__ import annotations

import numpy as np
import pytest
import torch
from candidates import candidate_of
from networks import NETWORKS
from torch.utils.flop_counter import FlopCounterMode

import ray_nascomp as nc
from ray_nascomp.errors import InfeasibleError, LayerCollapsedError
from ray_nascomp.space import Space

DATA = (torch.randn(64, 1, 8, 8), torch.arange(64) % 10)


def macs(network: torch.nn.Module) -> int:
    inputs = torch.randn(2, 1, 8, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        network.eval()(inputs)
    return counter.get_total_flops() // 2 // 2


@pytest.mark.parametrize("kind", NETWORKS)
def test_params_and_macs_are_exact_for_random_configs(kind):
    task = nc.Task(NETWORKS[kind](), DATA, DATA)
    costs = nc.CostModel(task)
    space = Space(nc.compression_space(task, max_sparsity=0.95))
    rng = np.random.default_rng(0)
    feasible = 0
    for _ in range(30):
        config = space.sample(rng)
        config["prune"]["method"] = "l1_norm"
        try:
            cost = costs(config)
        except LayerCollapsedError:
            continue
        network = candidate_of(task, config).network
        assert cost["params"] == sum(p.numel() for p in network.parameters())
        assert cost["macs"] == macs(network)
        feasible += 1
    assert feasible >= 15


def test_file_size_is_foretold_within_a_few_percent(digits_task):
    costs = nc.CostModel(digits_task)
    for config in ({}, {"quantize": {"bits": 8}}, {"prune": {"sparsity": 0.5}, "quantize": {"bits": {"first.0": 8}}}):
        step = nc.compress(digits_task, config, epochs=0)
        assert costs(config)["size_mb"] == pytest.approx(step.metrics["size_mb"], rel=0.01)


def test_the_dense_model_has_ratios_of_one_and_bits_only_change_bytes_and_bit_operations(digits_task):
    costs = nc.CostModel(digits_task)
    dense, quantized = costs({}), costs({"quantize": {"bits": 8}})
    assert dense["params_ratio"] == dense["macs_ratio"] == dense["size_ratio"] == 1
    assert quantized["params"] == dense["params"]
    assert quantized["bitops"] == dense["bitops"] / 16
    assert quantized["size_mb"] < dense["size_mb"] / 2


def test_a_collapsed_layer_is_infeasible_with_the_reason(digits_task):
    costs = nc.CostModel(digits_task)
    with pytest.raises(InfeasibleError, match=r"'first.0' has 16 channels; a sparsity of 0.98"):
        costs({"prune": {"sparsity": {"first.0": 0.98}}})
    many = costs.many([{}, {"prune": {"sparsity": 0.98}}])
    assert many["params"][0] == costs({})["params"]
    assert np.isnan(many["params"][1])


def test_an_architecture_without_a_layer_ignores_its_dimensions(elastic_task):
    costs = nc.CostModel(elastic_task)
    base = {"architecture": {"depth": 1, "width": 8}}
    assert costs(base)["params"] < costs({})["params"]
    with_dead = {**base, "prune": {"sparsity": {"blocks.1.0": 0.5}}}
    assert costs(base) == costs(with_dead)
    assert costs.canonical({**base, "prune": {"sparsity": {"blocks.1.0": 0.5, "blocks.0.0": 0.5}}}) == costs.canonical(
        {**base, "prune": {"sparsity": {"blocks.1.0": 0.25, "blocks.0.0": 0.5}}}
    )


def test_cost_model_pickles_without_weights():
    import cloudpickle

    big = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 20_000), torch.nn.ReLU(), torch.nn.Linear(20_000, 10)
    )
    costs = nc.CostModel(nc.Task(big, DATA, DATA))
    assert len(cloudpickle.dumps(costs)) < 100_000


def test_cost_model_of_smaller_forms_pickles_without_the_original():
    import cloudpickle
    from ray import tune

    def build(architecture):
        width = architecture["width"]
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.Linear(width, 10))

    original = nc.Task(build({"width": 20_000}), DATA, DATA)
    architecture = {"width": tune.choice([8, 16])}
    task = nc.Task(build({"width": 16}), DATA, DATA, build=build, architecture=architecture, original=original)
    costs = nc.CostModel(task)
    assert len(cloudpickle.dumps(costs)) < 100_000
    assert costs({"architecture": {"width": 8}})["params_ratio"] > 1000


@pytest.fixture(scope="module")
def elastic_task():
    from networks import PlainNet
    from ray import tune

    def build(architecture):
        width = architecture["width"]
        return PlainNet((width,) if architecture["depth"] == 1 else (width, 12))

    space = {"depth": tune.choice([1, 2]), "width": tune.choice([8, 6])}
    return nc.Task(PlainNet((8, 12)), DATA, DATA, build=build, architecture=space)
