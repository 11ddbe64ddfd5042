"""Convolutions of a library's own class, which pad their inputs by themselves, with ReLU6: EfficientNet's way."""

from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import ray_nascomp as nc


class SamePadConv(nn.Conv2d):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, bias=False, **keywords)
        self.margin = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, inputs):
        return functional.conv2d(self.margin(inputs), self.weight, None, self.stride, 0, 1, self.groups)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(SamePadConv(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(SamePadConv(16, 16, 3, stride=2, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.pointwise = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.pointwise(self.depthwise(self.stem(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def task(digits):
    torch.manual_seed(0)
    network = Net()
    inputs, targets = digits["train"]
    optimizer = torch.optim.Adam(network.parameters(), 3e-2)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return nc.Task(network.eval(), digits["train"], digits["val"])


def test_all_layers_are_seen(task):
    kinds = {layer.name: layer.kind for layer in task.spec.layers if layer.kind != "batch_norm"}
    assert kinds == {
        "stem.0": "conv",
        "depthwise.0": "depthwise_conv",
        "pointwise.0": "conv",
        "head": "linear",
    }
    assert list(task.spec.prunable_names) == ["stem.0", "pointwise.0"]
    assert nc.CostModel(task)({})["macs"] == 16 * 9 * 16 + 16 * 9 * 4 + 16 * 24 * 4 + 24 * 10


@pytest.mark.parametrize("method", ["l1_norm", "taylor", "slim", "movement"])
def test_pruned_channels_are_gone(task, method):
    config = {"prune": {"method": method, "sparsity": {"stem.0": 0.5, "pointwise.0": 0.25}, "round_to": 1}}
    step = nc.compress(task, config, epochs=0)
    network = step.run.candidate.network
    assert network.stem[0].weight.shape == (8, 1, 3, 3)
    assert network.depthwise[0].weight.shape == (8, 1, 3, 3)
    assert network.pointwise[0].weight.shape == (18, 8, 1, 1)
    assert step.metrics["params"] == nc.CostModel(task)(config)["params"]


@pytest.mark.parametrize("method", ["ptq", "lsq"])
def test_eight_bits_run_in_integer_kernels_from_end_to_end(task, method, tmp_path):
    config = {"finetune": {"lr": 1e-3}, "quantize": {"method": method, "bits": 8}}
    step = nc.compress(task, config, epochs=0 if method == "ptq" else 1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(step.artifact.content, options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert operators["QLinearConv"] == 3
    assert operators["QGemm"] == 1
    assert not operators.keys() & {"Conv", "FusedConv", "Gemm", "Pad"}
    assert operators["Clip"] == 1  # Before the mean, which is taken in floating point.
    assert step.artifact.error < 0.03
    assert step.metrics["accuracy"] > nc.compress(task, {}, epochs=0).metrics["accuracy"] - 0.02
