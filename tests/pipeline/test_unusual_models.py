"""Models that are built in unusual ways: right, or refused with the reason, and never wrong."""

from __future__ import annotations

import pytest
import torch
from networks import NormThenReLU
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ray_nascomp as nc
from ray_nascomp.deployment.export import ExportError
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.errors import ConfigError
from ray_nascomp.pipeline import CompressionRun

INPUTS = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = (INPUTS, torch.arange(64) % 10)
HALF = {"prune": {"sparsity": 0.5}, "quantize": {"bits": 8}}


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 192), nn.Linear(192, 192)
        self.second.weight = self.first.weight
        self.head = nn.Linear(192, 10)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.head = conv(3, 8), conv(8, 6), nn.BatchNorm2d(14), nn.Linear(14, 10)

    def forward(self, x):
        x = self.first(x)
        x = self.norm(torch.cat([x, self.second(torch.relu(x))], 1))
        return self.head(torch.relu(x).mean((2, 3)))


class SharedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(torch.relu(self.conv(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class AttentionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.layer(self.project(x.flatten(1, 2))).mean(1))


class PReLUNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 32), nn.PReLU(), nn.Linear(32, 10))


class BranchNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x) if x.sum().item() > 0 else self.head(-x)


class BiasedNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


class FreshNet(nn.Module):
    """Residual blocks that begin as nothing: the last norm of each is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), NormThenReLU(8))
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(8, 16), NormThenReLU(16), conv(16, 8), nn.BatchNorm2d(8)) for _ in range(2)
        )
        for block in self.blocks:
            nn.init.zeros_(block[-1].weight)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("make", [TiedNet, DenseNet, SharedNet, PReLUNet, BiasedNet, AttentionNet, FreshNet])
def test_costs_stay_exact_and_the_file_does_what_the_model_does(make):
    torch.manual_seed(0)
    task = nc.Task(make(), DATA, DATA)
    config = HALF
    if make is TiedNet:
        with pytest.raises(ConfigError, match="no channels or heads of this model can be removed"):
            nc.compress(task, HALF, epochs=0)
        config = {"quantize": HALF["quantize"]}
    step = nc.compress(task, config, epochs=1)
    assert step.metrics["feasible"]
    assert step.metrics["export_error"] < 0.03
    network = step.run.candidate.network
    assert step.metrics["params"] == sum(parameter.numel() for parameter in network.parameters())
    if make is not AttentionNet:  # torch counts its fused layers as nothing in evaluation mode.
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(INPUTS[:2])
        assert step.metrics["macs"] == counter.get_total_flops() // 4


@pytest.mark.parametrize("method", ["l1_norm", "level"])
def test_a_pruned_run_with_biases_is_restored_with_its_optimizer(method, tmp_path):
    torch.manual_seed(0)
    task = nc.Task(BiasedNet(), DATA, DATA)
    config = {"prune": {"method": method, "sparsity": 0.5}}
    expected = nc.compress(task, config, epochs=3).artifact.content
    first = CompressionRun(task, config, 3)
    first.step()
    first.step()
    first.save(tmp_path)
    second = CompressionRun(task, config, 3)
    second.restore(tmp_path)
    while not second.is_done:
        step = second.step()
    assert step.artifact.content == expected


def test_a_frozen_model_is_pruned_by_taylor_and_trained_back():
    network = BiasedNet().requires_grad_(False)
    task = nc.Task(network, DATA, DATA)
    step = nc.compress(task, {"prune": {"method": "taylor", "sparsity": 0.5}}, epochs=1)
    assert step.metrics["feasible"]
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_model_that_branches_on_its_inputs_is_refused():
    torch.manual_seed(0)
    task = nc.Task(BranchNet(), (INPUTS.abs(), DATA[1]), (-INPUTS.abs(), DATA[1]))
    with pytest.raises(ExportError, match="differ"):
        nc.compress(task, {}, epochs=0)


def test_a_weight_normalised_layer_is_pruned_as_a_plain_one():
    network = BiasedNet()
    plain = sum(parameter.numel() for parameter in network.parameters())
    nn.utils.parametrizations.weight_norm(network[0])
    task = nc.Task(network, DATA, DATA)
    assert [group.name for group in task.spec.prunable_groups] == ["0"]
    assert nc.CostModel(task)({})["params"] == plain
    step = nc.compress(task, {"prune": {"sparsity": 0.5}}, epochs=0)
    assert step.metrics["params"] < 0.6 * plain
    assert step.metrics["export_error"] < 1e-5


class LearnedMask(nn.Module):
    """Attention under a mask that is learned for each head and belongs to the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(24, 32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.mask = nn.Parameter(torch.randn(4, 8, 8))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(2).unflatten(2, (8, 8)).transpose(1, 2).flatten(2))
        mixed, _ = self.attention(x, x, x, attn_mask=self.mask.repeat(x.shape[0], 1, 1), need_weights=False)
        return self.head((x + mixed).mean(1))


def test_a_parameter_of_the_model_itself_is_trained_and_heads_keep_their_masks(tmp_path):
    torch.manual_seed(0)
    network = LearnedMask()
    task = nc.Task(network, DATA, DATA)
    config = {"prune": {"sparsity": {"attention": 0.5}}, "quantize": {"method": "lsq", "bits": 8}}
    step = nc.compress(task, config, epochs=1)
    assert step.metrics["feasible"]
    assert step.metrics["export_error"] < 0.03
    small = step.run.candidate.network.eval()
    assert len(small.attention.kept_heads) == 2
    assert not torch.equal(small.mask, network.mask)
    step.save(tmp_path)
    loaded = nc.load(tmp_path, LearnedMask())
    assert loaded.attention.kept_heads == small.attention.kept_heads
    assert torch.equal(loaded(INPUTS), small(INPUTS))


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"train_data: inputs of .*64.* with 5 targets"):
        nc.Task(BiasedNet(), (INPUTS, DATA[1][:5]), DATA)
    task = nc.Task(BiasedNet(), DATA, (INPUTS, DATA[1][:, None]))
    with pytest.raises(ConfigError, match=r"\(64, 1\)"):
        nc.compress(task, {}, epochs=0)


def test_a_builder_that_returns_no_module_is_refused():
    from ray import tune

    space = {"width": tune.choice([8])}
    task = nc.Task(BiasedNet(), DATA, DATA, build=lambda architecture: None, architecture=space)
    with pytest.raises(ConfigError, match="build: it returned a NoneType"):
        nc.compress(task, {"architecture": {"width": 8}}, epochs=0)


def test_a_goal_against_the_tasks_direction_is_refused():
    task = nc.Task(BiasedNet(), DATA, DATA)
    with pytest.raises(ConfigError, match="'min' was given, the task says 'max'"):
        nc.compression_trainable(task, nc.Goal([nc.Objective("accuracy", "min")]))


def test_channels_are_left_in_multiples_where_asked():
    wide = nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 12), nn.ReLU(), nn.Flatten(), nn.Linear(768, 10))
    task = nc.Task(wide, DATA, DATA)
    costs = nc.CostModel(task)
    for sparsity, left in ((0.0, (32, 12)), (0.05, (32, 8)), (0.4, (16, 8)), (0.95, (8, 8))):
        config = {"prune": {"sparsity": sparsity, "round_to": 8}}
        network = nc.compress(task, config, epochs=0).run.candidate.network
        assert (network[0].out_channels, network[2].out_channels) == left
        assert costs(config)["params"] == sum(parameter.numel() for parameter in network.parameters())
    assert costs.canonical({"prune": {"sparsity": 0.45, "round_to": 8}}) == costs.canonical(
        {"prune": {"sparsity": 0.5, "round_to": 8}}
    )


def test_statistics_that_never_move_are_trained_with_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), nn.BatchNorm2d(8, momentum=0.0), nn.Flatten(), nn.Linear(512, 10))
    run = nc.compress(nc.Task(model, DATA, DATA), {"finetune": {"lr": 1e-2}}, epochs=2).run
    norm = run.candidate.network[2]
    assert norm.momentum == 0.1
    assert (norm.running_mean - model[2].running_mean).abs().min() > 1e-3
    assert model[2].momentum == 0.0


class MagnitudeNet(nn.Module):
    """Where a magnitude is zero its square root has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum, self.head = nn.Linear(192, 32, bias=False), nn.Linear(16, 10)

    def forward(self, x):
        real, imaginary = self.spectrum(x.flatten(1)).chunk(2, 1)
        return self.head((real.square() + imaginary.square()).sqrt())


@pytest.mark.parametrize("quantize", [{}, {"method": "ptq", "bits": 8}, {"method": "qat", "bits": 8, "start": 0}])
def test_training_that_diverges_is_infeasible(quantize):
    inputs = INPUTS.clone()
    inputs[5] = 0
    task = nc.Task(MagnitudeNet(), (inputs, DATA[1]), DATA)
    metrics = nc.compress(task, {"quantize": quantize}, epochs=2).metrics
    assert not metrics["feasible"]
    assert metrics["reason"] == "weights are not finite after epoch 1; try a lower finetune/lr"


def test_layers_with_equal_weights_are_told_apart():
    torch.manual_seed(0)
    network = FreshNet().eval()
    with torch.no_grad():
        expected = network(INPUTS)
    step = nc.compress(nc.Task(network, DATA, DATA), {"quantize": {"method": "ptq", "bits": 8}}, epochs=0)
    found = torch.from_numpy(run_session(make_session(step.artifact.content), INPUTS, ("x",)))
    assert (found - expected).norm() / expected.norm() < 0.02
    assert step.metrics["size_ratio"] > 1.5
