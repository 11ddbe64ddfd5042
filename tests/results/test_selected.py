"""The chosen model on the test set, where the task has another original."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from results.test_results import write_trial
from torch import nn

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.data import Data
from ray_nascomp.tasks.known import find_task


class Halved(nn.Module):
    """Takes an image's halves, by other names than the task's model has."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(64, 10)

    def forward(self, upper, lower):
        return self.classify(
            nn.functional.pad(upper.flatten(1), (0, 32)) + nn.functional.pad(lower.flatten(1), (32, 0))
        )


def halved(split):
    images, labels = split
    return (images[:, :, :4].contiguous(), images[:, :, 4:].contiguous()), labels


def selected(task: nc.Task, folder) -> nc.SelectedModel:
    goal = nc.Goal([nc.Objective("accuracy")])
    step = nc.compress(task, {"quantize": {"bits": 8}}, goal=goal, epochs=0)
    step.save(write_trial(folder, "only", [step.metrics], {}) / "checkpoint_000000")
    return nc.Results(folder).trial("only")


def test_the_original_is_judged_on_the_same_samples_where_it_reads_them_alike(digits, digits_task, tmp_path):
    original = nc.Task(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits["train"], digits["val"])
    task = digits_task.with_changes(original=original, test_data=None)
    model = selected(task, tmp_path)
    few = (digits["test"][0][:60], digits["test"][1][:60])
    judged = model.evaluate(few, task=task, batch_sizes=(1,))
    reference = original.evaluate(original.predict(original.model), Data(few, "few"))
    assert judged["accuracy"] > judged["accuracy_original"] == pytest.approx(reference)
    assert judged["speedup_batch_1"] < 1


def test_an_original_that_reads_samples_otherwise_is_judged_on_its_own(digits, digits_task, tmp_path):
    parts = {name: halved(split) for name, split in digits.items()}
    original = nc.Task(Halved(), parts["train"], parts["val"], test_data=parts["test"])
    model = selected(digits_task.with_changes(original=original), tmp_path)
    task = digits_task.with_changes(original=original, test_data=digits["test"])
    reference = original.evaluate(original.predict(original.model), original.test_data)
    judged = model.evaluate(task=task, batch_sizes=(1,))
    assert judged["accuracy_original"] == pytest.approx(reference)
    assert judged["accuracy_drop"] == pytest.approx(reference - judged["accuracy"])
    with pytest.raises(ConfigError, match="test_data: the task's original reads its samples otherwise"):
        model.evaluate(digits["test"], task=task)


def test_the_chosen_plan_is_trained_on_further_samples(digits, digits_task, tmp_path):
    model = selected(digits_task, tmp_path)
    images, labels = digits["train"]
    further = torch.cat([images, images.flip(0)]), torch.cat([labels, torch.full_like(labels, -100)])
    # As if the trial had been trained for an epoch, and badly.
    model = replace(model, metrics={**model.metrics, "accuracy": 0.0, "accuracy_drop": 1.0, "epoch": 1})
    refined = model.refine(1, train_data=further, task=digits_task, progress=False, folder=tmp_path / "refined")
    rate = model.refine(1, progress=False).config["finetune"]["lr"]
    assert refined.config["finetune"]["lr"] == pytest.approx(rate * 2**-0.32)
    assert refined.metrics["accuracy"] > 0.9
    assert refined.evaluate(batch_sizes=(1,))["accuracy"] > 0.9
    assert refined.network(task=digits_task)(images[:1]).shape == (1, 10)
    poor = replace(refined, metrics={**refined.metrics, "accuracy": 0.0, "accuracy_drop": 1.0})
    again = poor.refine(1, train_data=further, task=digits_task, progress=False)
    assert again.config["finetune"]["lr"] == refined.config["finetune"]["lr"]
    # A goal that wants the original's outputs does not mind an accuracy that is worse by luck.
    close = nc.Goal([nc.Objective("divergence", "min")])
    far = replace(refined, goal=close, metrics={**refined.metrics, "accuracy": 1.0, "divergence": 9.0})
    assert far.refine(1, task=digits_task, progress=False) is not far
    near = replace(refined, goal=close, metrics={**refined.metrics, "accuracy": 0.0, "divergence": 0.0})
    assert near.refine(1, task=digits_task, progress=False) is near
    with pytest.raises(ConfigError, match="train_data: the inputs a, b were given; allowed: input_0"):
        model.refine(1, train_data=({"a": images, "b": images}, labels), task=digits_task)
    # Nobody else finds the task of the further samples, though it is the same by what it judges.
    twins = images.flip(0), labels.flip(0)
    model.refine(1, train_data=twins, task=digits_task, progress=False)
    assert find_task(digits_task.fingerprint) is digits_task
