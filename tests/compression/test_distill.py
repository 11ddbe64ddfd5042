from __future__ import annotations

import pytest
import torch
from torch import nn

import ray_nascomp as nc
from ray_nascomp.compression.distill import distillation_loss


def test_classes_are_compared_as_distributions():
    outputs, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    found = distillation_loss(outputs, teacher, torch.tensor([0]), temperature=2.0)
    # Half each, against e to 1 (softened by 2): log(e + 1) - 1/2 - log(2) nats, times the temperature's square.
    assert found.item() == pytest.approx(4 * (1.3132617 - 0.5 - 0.6931472), rel=1e-5)


def test_classes_of_pixels_lie_along_the_second_axis():
    outputs, teacher = torch.randn(2, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    last = distillation_loss(outputs.movedim(1, -1), teacher.movedim(1, -1), torch.zeros(2, 5, 4, dtype=torch.long))
    second = distillation_loss(outputs, teacher, torch.zeros(2, 5, 4, dtype=torch.long))
    assert second.item() == pytest.approx(last.item(), rel=1e-6)


def test_places_without_a_target_do_not_count():
    outputs, teacher = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, -100, -100], [2, -100, -100, -100], [-100] * 4])
    found = distillation_loss(outputs, teacher, targets)
    labelled = targets >= 0
    assert found.item() == pytest.approx(
        distillation_loss(outputs[labelled], teacher[labelled], targets[labelled]).item()
    )
    assert distillation_loss(outputs, teacher, torch.full_like(targets, -100)).item() == 0
    # A sample without a label can still be learnt from the teacher.
    one = torch.tensor([-100])
    assert distillation_loss(outputs[:1, 0], teacher[:1, 0], one).item() > 0


@pytest.mark.parametrize("shape", [(8, 3), (8, 1), (8,)])
def test_values_are_compared_by_their_squared_difference(shape):
    teacher = torch.zeros(shape)
    assert distillation_loss(teacher + 3, teacher, torch.zeros(shape)).item() == 9


def test_distillation_alone_teaches_a_regression():
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    data = (inputs, model(inputs).detach())

    def error(outputs, targets):
        return nn.functional.mse_loss(outputs, targets).item()

    task = nc.Task(model, data, data, metric=error, mode="min", loss=nn.functional.mse_loss)
    config = {"prune": {"sparsity": 0.5}, "finetune": {"lr": 1e-2, "distill": {"weight": 1.0}}}
    before, *_, after = (step.metrics["error"] for step in nc.compress_steps(task, config, epochs=10))
    assert after < 0.2 * before


def test_samples_without_a_label_are_learnt_from_the_teacher_alone(digits_task):
    inputs, targets = digits_task.train_data.head(256)

    def divergences(targets, weight):
        task = digits_task.with_changes(train_data=(inputs, targets))
        config = {"prune": {"sparsity": 0.6}, "finetune": {"lr": 1e-2, "distill": {"weight": weight}}}
        steps = nc.compress_steps(task, config, epochs=5)
        return [step.metrics["divergence"] for step in steps]

    unlabelled = torch.full_like(targets, -100)
    few = torch.where(torch.arange(256) < 32, targets, unlabelled)
    before, *_, after = divergences(few, 0.9)
    assert after < 0.5 * before
    # All say the same where no label counts, and nothing is learnt where nobody teaches.
    assert divergences(unlabelled, 1.0) == divergences(targets, 1.0)
    before, *_, after = divergences(unlabelled, 0.0)
    assert after > 0.5 * before
