from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import PlainNet

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError

DATA = (torch.randn(128, 1, 8, 8), torch.arange(128) % 10)


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return nc.Task(PlainNet(), DATA, DATA)


@pytest.mark.parametrize(("method", "order"), [("l1_norm", 1), ("l2_norm", 2)])
def test_a_global_sparsity_takes_the_least_important_units_of_all_groups(task, method, order):
    costs = nc.CostModel(task)
    plan = costs.plan({"prune": {"method": method, "scope": "global", "sparsity": 0.4}})
    counts = costs.removed(plan)
    widths = {group.name: group.width for group in task.spec.prunable_groups}
    assert sum(counts.values()) == round(0.4 * sum(widths.values()))
    assert all(counts[name] < width for name, width in widths.items())
    norms = []
    for group in task.spec.prunable_groups:
        weight = task.model.get_submodule(group.name).weight.detach().flatten(1).norm(order, dim=1)
        norms += (weight / weight.mean()).tolist()
    threshold = sorted(norms)[sum(counts.values()) - 1]
    first = task.model.get_submodule("hidden").weight.detach().norm(order, dim=1)
    assert counts["hidden"] == int((first / first.mean() <= threshold + 1e-6).sum())


def test_a_global_sparsity_follows_the_method():
    torch.manual_seed(0)
    network = PlainNet()
    with torch.no_grad():
        # Large weights, which nothing reads: important by their norm, not by their effect on the loss.
        network.hidden.weight[:10] *= 20
        network.head.weight[:, :10] = 0
    own = nc.Task(network, DATA, DATA)
    costs = nc.CostModel(own)
    config = {"prune": {"scope": "global", "sparsity": 0.3}}
    found = {}
    for method in ("l1_norm", "taylor", "movement"):
        plan = costs.plan({"prune": {**config["prune"], "method": method}})
        found[method] = costs.removed(plan)
        assert sum(found[method].values()) == 12
    assert found["taylor"]["hidden"] >= 10
    assert found["l1_norm"] != found["taylor"] != found["movement"]


def test_a_kept_energy_becomes_a_rank_for_each_layer_that_gets_smaller(task):
    costs = nc.CostModel(task)
    few, many = (costs.ranks(costs.plan({"low_rank": {"energy": energy}})) for energy in (0.8, 0.99))
    assert 0 < few["hidden"] < many.get("hidden", 21)
    step = nc.compress(task, {"low_rank": {"energy": 0.8}}, epochs=0)
    assert step.metrics["params"] == costs({"low_rank": {"energy": 0.8}})["params"] < costs({})["params"]


def test_a_budget_gives_bits_by_sensitivity(task):
    costs = nc.CostModel(task)
    layers = {layer.name: np.prod(layer.weight_shape) for layer in task.spec.quantizable_layers}
    for budget in (0.15, 0.3):
        plan = costs.plan({"quantize": {"bits": "adaptive", "budget": budget}})
        used = sum(size * plan.quantize.of(name) / 32 for name, size in layers.items())
        assert used <= budget * sum(layers.values()) * (1 + 1e-9)
        assert len(set(plan.quantize.bits.values())) > 1
    with pytest.raises(ConfigError, match="least"):
        costs.plan({"quantize": {"bits": "adaptive", "budget": 0.01}})


def test_what_depends_on_weights_is_refused_with_another_architecture(task):
    from ray import tune

    elastic = nc.Task(
        PlainNet(), DATA, DATA, build=lambda a: PlainNet((a["width"], 12)), architecture={"width": tune.choice([4, 8])}
    )
    with pytest.raises(ConfigError, match="task's own"):
        nc.CostModel(elastic)({"architecture": {"width": 4}, "prune": {"scope": "global", "sparsity": 0.5}})


def test_the_gentle_start_of_a_space_only_makes_numbers_smaller(task):
    from ray_nascomp.builders import gentle_config

    config = gentle_config(nc.compression_space(task, ranks="layer"))
    costs = nc.CostModel(task)
    assert costs(config)["params"] == costs({})["params"]
    assert costs(config)["size_mb"] < costs({})["size_mb"] / 2
    assert "lr" not in config.get("finetune", {})


def test_the_gentle_config_keeps_every_block():
    from ray import tune

    from ray_nascomp.builders import gentle_config

    block = {"keep": tune.choice([True, False]), "width": tune.qrandint(8, 64, 8)}
    config = gentle_config({"architecture": {"block": block}, "prune": {"sparsity": tune.quniform(0, 0.5, 0.1)}})
    assert config == {"architecture": {"block": {"keep": True, "width": 64}}, "prune": {"sparsity": 0.0}}
