from __future__ import annotations

import copy

import pytest
import torch
from candidates import candidate_of as made
from networks import NETWORKS, with_large_weights

import ray_nascomp as nc
from ray_nascomp.compression.batch_norm import reestimate_batch_norm
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.pruners import CHANNEL_METHODS

METHODS = CHANNEL_METHODS
INPUTS = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
DATA = (INPUTS, torch.arange(64) % 10)


def candidate_of(kind: str, method: str, sparsity: float = 0.5):
    torch.manual_seed(0)
    task = nc.Task(with_large_weights(NETWORKS[kind]()), DATA, DATA)
    return task, made(task, {"prune": {"method": method, "sparsity": sparsity}})


def masked(task, candidate) -> torch.nn.Module:
    """The task's model with the removed channels zeroed, their batch normalisations included."""
    network = copy.deepcopy(task.model)
    with torch.no_grad():
        for layer in task.spec.layers:
            owner = layer.out_group or (layer.in_groups[0][0] if layer.kind == "batch_norm" else None)
            dead = candidate.removed.get(owner, [])
            module = network.get_submodule(layer.name)
            for parameter in (module.weight, module.bias) if dead else ():
                if parameter is not None:
                    parameter[dead] = 0
    return network.eval()


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_materialised_model_equals_the_masked_one(kind, method):
    task, candidate = candidate_of(kind, method)
    expected = masked(task, candidate)(INPUTS)
    assert (candidate.network.eval()(INPUTS) - expected).abs().max() < 1e-5
    assert (expected - task.model(INPUTS)).abs().max() > 0.01
    for group in task.spec.prunable_groups:
        assert len(candidate.removed[group.name]) == group.width // 2


def test_channels_are_those_with_the_smallest_norm():
    task, candidate = candidate_of("plain", "l1_norm")
    norms = task.model.get_submodule("blocks.0.0").weight.flatten(1).abs().sum(1)
    assert candidate.removed["blocks.0.0"] == sorted(norms.argsort()[:4].tolist())


def test_taylor_looks_at_the_data():
    assert candidate_of("plain", "taylor")[1].removed != candidate_of("plain", "l1_norm")[1].removed


@pytest.mark.parametrize("method", [*METHODS, "level"])
def test_pruning_leaves_the_tasks_model_as_it_was(method):
    torch.manual_seed(0)
    network = with_large_weights(NETWORKS["residual"]())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    task = nc.Task(network, DATA, DATA)
    made(task, {"prune": {"method": method, "sparsity": 0.5}})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_level_zeroes_single_weights_and_training_keeps_them_zero():
    task, candidate = candidate_of("residual", "level", 0.75)
    mask = candidate.masks["first.0"]
    assert mask.mean().item() == pytest.approx(0.25, abs=0.01)
    step = nc.compress(task, {"prune": {"method": "level", "sparsity": 0.75}}, epochs=2)
    weight = step.run.candidate.network.get_submodule("first.0").weight
    assert (weight[mask == 0] == 0).all()
    assert (weight[mask == 1] != 0).all()


@pytest.mark.parametrize("method", ["qat", "lsq", "dorefa"])
def test_single_weights_stay_zero_under_a_quantizer_that_trains(method):
    task, candidate = candidate_of("residual", "level", 0.75)
    config = {"prune": {"method": "level", "sparsity": 0.75}, "quantize": {"method": method, "bits": 4}}
    network = nc.compress(task, config, epochs=1).run.candidate.network
    for name, mask in candidate.masks.items():
        assert (network.get_submodule(name).weight[mask == 0] == 0).all()


def test_folding_keeps_the_outputs():
    network = with_large_weights(NETWORKS["residual"]())
    expected = network(INPUTS)
    fold_batch_norm(network, INPUTS)
    assert (network(INPUTS) - expected).abs().max() < 1e-4
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_reestimated_statistics_are_those_of_the_data():
    network = torch.nn.Sequential(torch.nn.Identity(), torch.nn.BatchNorm2d(1))
    batches = [(INPUTS[:32], DATA[1][:32]), (INPUTS[32:], DATA[1][32:])]
    reestimate_batch_norm(network, batches)
    assert network[1].running_mean.item() == pytest.approx(INPUTS.mean().item(), abs=1e-6)
    assert network[1].momentum == 0.1
