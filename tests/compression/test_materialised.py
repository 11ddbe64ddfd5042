from __future__ import annotations

import copy
import warnings

import pytest
import torch
from candidates import candidate_of
from torch import nn

import ray_nascomp as nc
from ray_nascomp.compression.attention import find_attentions
from ray_nascomp.tasks.calling import call

transformer_families = pytest.importorskip("transformer_families")
FAMILIES = transformer_families.FAMILIES


def task_of(family: str) -> nc.Task:
    model, inputs = transformer_families.make(family, "sdpa")
    inputs = {name: value.repeat(8, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    return nc.Task(model, (inputs, torch.zeros(16, dtype=torch.long)), (inputs, torch.zeros(16, dtype=torch.long)))


def within_layers(spec: nc.ModelSpec) -> dict[str, float]:
    """Half of all heads and neurons; channels that a LayerNorm sees are left, which a mask cannot stand for."""
    normed = {name for layer in spec.layers if layer.kind == "norm" for name, _ in layer.in_groups}
    return {group.name: 0.5 for group in spec.prunable_groups if group.name not in normed}


def masked(task: nc.Task, removed: dict[str, list[int]]) -> nn.Module:
    network = task.network({})
    attentions = {attention.name: attention for attention in find_attentions(network)}
    groups = {group.name: group for group in task.spec.groups}
    with torch.no_grad():
        for name, units in removed.items():
            if name in attentions:
                for layer, columns in attentions[name].columns(units).items():
                    network.get_submodule(layer).weight[:, columns] = 0
                continue
            for layer in groups[name].layers:
                module = network.get_submodule(layer)
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        parameter[units] = 0
    return network.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_neurons_that_are_removed_equal_masked_ones(family):
    task = task_of(family)
    sparsity = within_layers(task.spec)
    assert sum(group.is_heads for group in task.spec.prunable_groups) >= 2
    candidate = candidate_of(task, {"prune": {"sparsity": sparsity}})
    assert candidate.removed.keys() == sparsity.keys()
    with torch.no_grad():
        found = call(candidate.network.eval(), task.example_inputs)
        expected = call(masked(task, candidate.removed), task.example_inputs)
        whole = call(copy.deepcopy(task.model).eval(), task.example_inputs)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert (expected - whole).abs().max() > 1e-2


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_convolution_before_a_recurrent_layer_is_pruned_with_its_inputs(recurrent, bidirectional):
    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 12, 3, padding=1)
            self.rnn = recurrent(12, 10, num_layers=2, batch_first=True, bidirectional=bidirectional)
            self.head = nn.Linear(20 if bidirectional else 10, 10)

        def forward(self, x):
            return self.head(self.rnn(torch.relu(self.conv(x)).transpose(1, 2))[0].mean(1))

    torch.manual_seed(0)
    inputs = torch.randn(32, 8, 16)
    data = (inputs, torch.arange(32) % 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = nc.Task(Speech(), data, data)
        assert task.spec
    assert torch.backends.mkldnn.enabled
    candidate = candidate_of(task, {"prune": {"sparsity": {"conv": 0.5}}})
    assert candidate.network.rnn.input_size == 6
    expected = copy.deepcopy(task.model)
    with torch.no_grad():
        expected.conv.weight[candidate.removed["conv"]] = 0
        expected.conv.bias[candidate.removed["conv"]] = 0
        assert (candidate.network.eval()(inputs) - expected.eval()(inputs)).abs().max() < 1e-6
        assert (expected(inputs) - task.model(inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("order", [["prune", "low_rank"], ["low_rank", "prune"]])
def test_pruning_and_factorising_in_both_orders_cost_what_was_foretold(order):
    task = task_of("llama")
    config = {
        "order": order,
        "prune": {"sparsity": within_layers(task.spec)},
        "low_rank": {"rank": {"*": 0.6}, "round_to": 4},
    }
    candidate = candidate_of(task, config)
    params = sum(parameter.numel() for parameter in candidate.network.parameters())
    assert nc.CostModel(task)(config)["params"] == params < nc.CostModel(task)({})["params"] * 0.6
    assert torch.isfinite(call(candidate.network.eval(), task.example_inputs)).all()
