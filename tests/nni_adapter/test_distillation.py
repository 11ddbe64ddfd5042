from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.compression.graph import remove_channels
from ray_nascomp.errors import ConfigError, InfeasibleError
from ray_nascomp.nni_adapter.distillation import LayerwiseDistillation
from ray_nascomp.nni_adapter.evaluator import train_on
from ray_nascomp.nni_adapter.fused import fused_compression
from ray_nascomp.nni_adapter.pruning import channels_to_remove
from ray_nascomp.nni_adapter.quantization import QuantizationSession


class Stack(nn.Module):
    """Linear layers of one width, one after another."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 24)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(depth))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(torch.relu(x))
        return self.head(x)


def halved(task: nc.Task) -> nn.Module:
    network = copy.deepcopy(task.model)
    groups = {group.name: (group, group.width // 2) for group in task.spec.prunable_groups}
    remove_channels(network, task.example_inputs, channels_to_remove(network, task, "l1_norm", groups, 0))
    return network


def test_dynamic_is_relative_to_the_teacher_and_zero_for_the_teacher_itself(digits_task):
    student = copy.deepcopy(digits_task.model)
    inputs = digits_task.example_inputs
    layers = ["stem.0", "expand.0"]
    extra = LayerwiseDistillation(student, digits_task, "dynamic", 0, layers)
    digits_task.predict(student)(inputs)
    assert extra.loss(inputs).item() == 0
    with torch.no_grad():
        student.stem[0].weight.mul_(1.5)
        student.expand[0].weight.mul_(0)
    student.eval()(inputs)
    loss = extra.loss(inputs).item()
    extra.close()
    assert loss == pytest.approx((0.25 + 1) / 2, rel=1e-3)
    assert not any(module._forward_hooks for module in student.modules())


def test_dynamic_follows_the_nearest_of_the_teachers_layers(digits):
    torch.manual_seed(0)
    task = nc.Task(Stack(6), digits["train"], digits["val"])
    student = Stack(2)
    state = {name: value for name, value in task.model.state_dict().items() if not name.startswith("blocks")}
    for mine, theirs in (("blocks.0", "blocks.0"), ("blocks.1", "blocks.1")):
        state |= {f"{mine}.{part}": task.model.state_dict()[f"{theirs}.{part}"] for part in ("weight", "bias")}
    student.load_state_dict(state)
    extra = LayerwiseDistillation(student, task, "dynamic", 0)
    inputs = digits["val"][0][:20]
    student(inputs)
    assert extra.loss(inputs).item() == pytest.approx(0, abs=1e-6)
    student.load_state_dict({**state, "blocks.1.weight": torch.zeros(24, 24)})
    student(inputs)
    assert extra.loss(inputs).item() > 0.05
    extra.close()


def test_adaptive1d_maps_fewer_channels_to_the_teachers(digits_task):
    student = halved(digits_task)
    extra = LayerwiseDistillation(student, digits_task, "adaptive1d", 0)
    shapes = sorted({tuple(parameter.shape) for parameter in extra.parameters() if parameter.dim() == 2})
    assert shapes == [(16, 8), (32, 16)]
    optimizer = torch.optim.AdamW([*student.parameters(), *extra.parameters()], 3e-3)
    losses = []
    student.train()
    for inputs, _ in itertools.chain(digits_task.train_batches(0), digits_task.train_batches(1)):
        student(inputs)
        loss = extra.loss(inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    extra.close()
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_layers_under_a_quantizer_are_distilled_too(digits_task):
    student = copy.deepcopy(digits_task.model)
    fold_batch_norm(student, digits_task.example_inputs)
    bits = {layer.name: 4 for layer in digits_task.spec.compressible_layers}
    session = QuantizationSession(student, digits_task, bits, {})
    extra = LayerwiseDistillation(student, digits_task, "dynamic", 0)
    inputs = digits_task.val_data.head(64)[0]
    student.eval()(inputs)
    assert 1e-4 < extra.loss(inputs).item() < 0.1  # Rounding alone: batch normalisations are in both.
    extra.close()
    session.close()


def test_what_cannot_be_compared_is_named(digits_task):
    student = halved(digits_task)
    with pytest.raises(InfeasibleError, match="'dynamic' compares"):
        LayerwiseDistillation(student, digits_task, "dynamic", 0)
    with pytest.raises(ConfigError, match="nothing"):
        LayerwiseDistillation(student, digits_task, "adaptive1d", 0, ["stem.0", "nothing"])
    with pytest.raises(ConfigError, match="'adaptive1d'"):
        LayerwiseDistillation(student, digits_task, "fitnets", 0)


@pytest.mark.parametrize(("prune", "quantize"), [("taylor", "qat"), ("movement", "lsq"), ("l1_norm", "dorefa")])
def test_the_fused_form_gives_masks_and_scales_that_hold(digits_task, prune, quantize):
    task, inputs = digits_task, digits_task.val_data.head(200)[0]
    network = copy.deepcopy(task.model).eval()
    fold_batch_norm(network, task.example_inputs)
    spec = nc.ModelSpec.from_model(network, task.example_inputs)
    groups = {group.name: (group, group.width // 4) for group in spec.prunable_groups}
    bits = {layer.name: 4 if layer.name == "expand.0" else 8 for layer in spec.compressible_layers}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    simulated = []

    def train(model, optimizer, step):
        train_on(itertools.islice(itertools.chain(*map(task.train_batches, range(4))), 60))(model, optimizer, step)
        simulated.append(task.predict(model)(inputs))

    result = fused_compression(
        network,
        task,
        groups,
        bits,
        train,
        45,
        (torch.optim.AdamW, {"lr": 1e-3}),
        prune_method=prune,
        quantize_method=quantize,
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert {name: len(indices) for name, indices in result.removed.items()} == {
        "stem.0": 4,
        "first.0": 4,
        "expand.0": 8,
    }
    network.load_state_dict(result.state)
    remove_channels(network, task.example_inputs, result.removed)
    assert result.calibration["expand.0"].weight.shape == (24,)
    session = QuantizationSession(
        network, task, bits, {}, train_on([]), (torch.optim.SGD, {"lr": 0.0}), None, quantize, result.calibration
    )
    outputs = task.predict(network)(inputs)
    session.close()
    assert (outputs - simulated[0]).norm() / simulated[0].norm() < 1e-3
    # A guess is right in a tenth; so few steps come to 30% or more, by the processor's last digits.
    assert (outputs.argmax(1) == task.val_data.head(200)[1]).float().mean() > 0.2
