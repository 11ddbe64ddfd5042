from __future__ import annotations

import pytest
import torch
from torch import nn

import ray_nascomp as nc

INPUTS = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 10


class Shared(nn.Module):
    """One block, called three times."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        for _ in range(3):
            x = (x + self.block(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_model_with_deprecated_norms_of_weights_is_compressed_after_it_was_trained(norm):
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    model(INPUTS).sum().backward()
    model.eval()
    expected = model(INPUTS)
    task = nc.Task(model, (INPUTS, LABELS), (INPUTS, LABELS), batch_size=8)
    assert torch.allclose(task.network({})(INPUTS), expected, atol=1e-6)
    step = nc.compress(task, {"prune": {"sparsity": {"*": 0.5}, "round_to": 1}}, epochs=0)
    assert step.metrics["params"] == 8 * 27 + 8 + 288 * 10 + 10
    assert len(model[0]._forward_pre_hooks) == 1


def test_a_block_that_is_called_again_and_again_has_integers_and_fewer_channels():
    torch.manual_seed(0)
    model = Shared()
    model.block[1].running_mean.normal_()
    task = nc.Task(model.eval(), (INPUTS, LABELS), (INPUTS, LABELS), batch_size=8)
    config = {"prune": {"sparsity": {"*": 0.5}, "round_to": 1}, "quantize": {"method": "ptq", "bits": 8}}
    step = nc.compress(task, config, epochs=0)
    assert step.metrics["size_ratio"] > 1.8
    assert step.metrics["params"] < 0.6 * sum(parameter.numel() for parameter in model.parameters())


def test_a_parametrized_layer_has_integers_and_the_model_keeps_its_parametrization():
    from torch.nn.utils.parametrizations import weight_norm
    from torch.nn.utils.parametrize import is_parametrized

    torch.manual_seed(0)
    network = nn.Sequential(weight_norm(nn.Conv1d(6, 6, 5, groups=2), dim=2), nn.Flatten(), nn.Linear(24, 3)).eval()
    data = (torch.randn(16, 6, 8), torch.arange(16) % 3)
    step = nc.compress(nc.Task(network, data, data), {"quantize": {"bits": 8}}, epochs=0)
    assert step.metrics["export_error"] < 0.03
    assert b"0.weight_q" in step.artifact.content
    assert is_parametrized(network[0])
