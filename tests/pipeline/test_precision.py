from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ray_nascomp as nc
from ray_nascomp.pipeline import CompressionRun, precision


class _Seen(nn.Module):
    """A network that notes what its second layer gets, and refuses all types but one where it is told to."""

    def __init__(self, width: int, needed: torch.dtype | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 10)
        self.needed = needed
        self.seen: set[torch.dtype] = set()
        self.taught: set[torch.dtype] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.first(images.flatten(1)).relu()
        if self.training:
            self.seen.add(hidden.dtype)
        elif len(images) > 2:  # Two samples are tried first.
            self.taught.add(hidden.dtype)
        if self.needed is not None and hidden.dtype != self.needed:
            raise RuntimeError(f"not implemented for {hidden.dtype}")
        return self.head(self.second(hidden).relu())


def _trained(digits, network: nn.Module, monkeypatch, **stages: Any) -> tuple[CompressionRun, float]:
    monkeypatch.setattr(precision, "_has_bfloat16", lambda: True)
    torch.manual_seed(0)
    task = nc.Task(network, digits["train"], digits["val"], batch_size=64)
    run = CompressionRun(task, {"finetune": {"lr": 1e-3}, **stages}, epochs=2)
    while not run.is_done:
        step = run.step()
    return run, step.metrics["accuracy"]


def test_large_networks_train_in_bfloat16_and_are_measured_in_float32(digits, monkeypatch):
    run, accuracy = _trained(digits, _Seen(1280), monkeypatch)
    network = run.candidate.network
    assert network.seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert accuracy > 0.9


@pytest.mark.parametrize("method", ["qat", "lsq", "lsq_plus", "dorefa"])
def test_simulated_integers_are_trained_in_bfloat16_too(digits, monkeypatch, method):
    quantize = {"method": method, "bits": 8, "start": 0.0}
    run, accuracy = _trained(digits, _Seen(1280), monkeypatch, quantize=quantize)
    assert torch.bfloat16 in run.candidate.network.seen
    assert accuracy > 0.85


@pytest.mark.parametrize(("width", "dtype"), [(1280, torch.bfloat16), (64, torch.float32)])
def test_a_large_teacher_teaches_in_bfloat16(digits, monkeypatch, width, dtype):
    finetune = {"lr": 1e-3, "distill": {"weight": 1.0}}
    run, accuracy = _trained(digits, _Seen(width), monkeypatch, finetune=finetune, prune={"sparsity": 0.9})
    assert run.task.model.taught == {dtype}
    # It is small enough to train in float32 itself, and learns from an untrained teacher.
    assert run.candidate.network.seen == {torch.float32}
    assert accuracy < 0.3


def test_small_networks_train_in_float32(digits, monkeypatch):
    run, _ = _trained(digits, _Seen(64), monkeypatch)
    assert run.candidate.network.seen == {torch.float32}


def test_what_does_not_run_in_bfloat16_trains_in_float32(digits, monkeypatch):
    run, accuracy = _trained(digits, _Seen(1280, needed=torch.float32), monkeypatch)
    assert run.candidate.network.seen == {torch.float32}
    assert accuracy > 0.9


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_restored_run_goes_on_whatever_the_order_of_weights_in_memory(digits, tmp_path, memory_format):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    task = nc.Task(network.to(memory_format=memory_format), digits["train"], digits["val"])
    config = {"finetune": {"lr": 3e-3}}
    whole = nc.compress(task, config, epochs=3)
    first = CompressionRun(task, config, epochs=3)
    for _ in range(2):
        first.step()
    first.save(tmp_path)
    second = CompressionRun(task, config, epochs=3)
    second.restore(tmp_path)
    while not second.is_done:
        step = second.step()
    assert step.artifact.content == whole.artifact.content
