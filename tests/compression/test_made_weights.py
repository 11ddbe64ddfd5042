from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.compression.made_weights import convolutions_making_weights


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        weight = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class Padded(nn.Conv2d):
    """Of a class of its own, with its own weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = Standardised(3, 12, 3), nn.BatchNorm2d(12)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.second = Padded(12, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


INPUTS = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_standardised_weights_have_no_bits_and_take_no_norm_in():
    network = Network().eval()
    data = INPUTS, torch.arange(32) % 5
    task = nc.Task(network, data, data)
    assert list(task.spec.quantizable_names) == ["second", "head"]
    expected = network(INPUTS).detach()
    fold_batch_norm(network, INPUTS)
    torch.testing.assert_close(network(INPUTS), expected, rtol=0, atol=1e-5)
    config = {"prune": {"method": "l1_norm", "sparsity": 0.5}, "quantize": {"method": "ptq", "bits": 8}}
    step = nc.compress(task, config, epochs=0)
    costs = nc.CostModel(task)(config)
    assert step.metrics["feasible"]
    assert step.metrics["params"] == costs["params"]
    assert step.metrics["export_error"] < 0.03
    assert costs["size_mb"] == pytest.approx(step.metrics["size_mb"], rel=0.03)
    with pytest.raises(nc.ConfigError, match="first"):
        nc.compress(task, {"quantize": {"method": "ptq", "bits": {"first": 8}}}, epochs=0)


def test_a_parametrized_weight_is_made_of_others_at_every_look():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3), dim=2), nn.ReLU())
    inputs = torch.randn(2, 3, 8)
    # Each look makes another tensor, which may lie where the one that was used lay.
    assert all(convolutions_making_weights(model, inputs) == {"0"} for _ in range(50))
