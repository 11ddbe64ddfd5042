from __future__ import annotations

import math
import pickle

import cloudpickle
import numpy as np
import pytest
import torch
from transformer_families import FAMILIES, make

import ray_nascomp as nc
from ray_nascomp.architecture import elastic_transformer
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.space import Space

GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}


def totals(spec: ModelSpec) -> tuple[int, int]:
    """Parameters and multiply-accumulates."""
    params, macs = spec.extra_params, spec.extra_macs
    for layer in spec.layers:
        params += layer.fixed_params
        if layer.weight_shape:
            params += math.prod(layer.weight_shape) + (layer.weight_shape[0] if layer.bias else 0)
        if layer.is_compressible:
            macs += math.prod(layer.weight_shape) * layer.positions
    return params, macs + sum(group.width * group.macs_per_unit for group in spec.groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_structures_equal_those_of_traced_networks(family: str) -> None:
    model, inputs = make(family, **(GROUPED if family in ("llama", "mistral") else {}))
    build, architecture = elastic_transformer(model, heads=(0.5, 0.75, 1.0))
    specs = build.specs(ModelSpec.from_model(model, inputs))
    space = Space({"architecture": architecture})
    rng = np.random.default_rng(0)
    for _ in range(3):
        config = space.sample(rng)["architecture"]
        network = build(config)
        told, traced = specs(config), ModelSpec.from_model(network, inputs)
        assert told.layers == traced.layers
        assert told.groups == traced.groups
        assert told == traced
    assert len(pickle.dumps(specs)) < 100_000


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_head_costs_what_it_does(family: str) -> None:
    model, inputs = make(family)
    build, architecture = elastic_transformer(model, heads=(0.25, 1.0), widths=(), depth=False)
    specs = build.specs(ModelSpec.from_model(model, inputs))
    config = {
        name: {key: domain.categories[0] for key, domain in values.items()} for name, values in architecture.items()
    }
    network = build(config)
    assert totals(specs(config)) == totals(ModelSpec.from_model(network, inputs))
    assert totals(specs(config))[0] == sum(parameter.numel() for parameter in network.parameters())


def test_a_cost_model_knows_sub_networks_without_their_weights() -> None:
    model, inputs = make("bert", num_labels=2)
    data = (dict(inputs), torch.tensor([0, 1]))
    build, architecture = elastic_transformer(model)
    task = nc.Task(model, data, data, build=build, architecture=architecture)
    costs = nc.CostModel(task)
    assert len(cloudpickle.dumps(costs)) < 4 * sum(parameter.numel() for parameter in model.parameters()) / 10
    config = Space({"architecture": architecture}).sample(np.random.default_rng(1))
    network = task.network(config["architecture"])
    assert costs(config)["params"] == sum(parameter.numel() for parameter in network.parameters())
    # Names stay those of the whole model, so a sparsity reaches the block that it was meant for.
    config["architecture"]["bert.encoder.layer.1"]["keep"] = False
    config["architecture"]["bert.encoder.layer.2"] = {"keep": True, "heads": 4, "width": 96}
    sparse = {**config, "prune": {"method": "l1_norm", "sparsity": {"bert.encoder.layer.2.intermediate.dense": 0.5}}}
    assert costs(config)["params"] - costs(sparse)["params"] == 48 * (64 + 64 + 1)
