from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import ray_nascomp as nc

INPUTS = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def unit(inputs: int, outputs: int, kernel: int) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Inception(nn.Module):
    """Branches of one input, joined; one of them pools first (Szegedy et al. 2014, arXiv 1409.4842)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.point, self.wide = unit(inputs, 16, 1), nn.Sequential(unit(inputs, 8, 1), unit(8, 16, 3))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(inputs, 8, 1))

    def forward(self, x):
        return torch.cat([self.point(x), self.wide(x), self.pooled(x)], 1)


class Signed(nn.Module):
    """What it joins has two signs: each part keeps its own scale."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, 16, 1), unit(inputs, 16, 3)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], 1)


class Nested(nn.Module):
    """Joins what was joined, and pooled."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inner, self.beside = Inception(inputs), unit(inputs, 8, 1)

    def forward(self, x):
        return torch.cat([torch.max_pool2d(self.inner(x), 3, 1, 1), self.beside(x)], 1)


def operators(content: bytes, path: str) -> Counter[str]:
    """What ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = path
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(("block", "width", "joined"), [(Inception, 40, 2), (Nested, 48, 4), (Signed, 32, 2)])
def test_parts_are_joined_as_integers(tmp_path, block, width, joined):
    torch.manual_seed(0)
    model = nn.Sequential(unit(3, 16, 3), block(16), block(width), unit(width, 8, 1), nn.Flatten(), nn.Linear(2048, 4))
    model(INPUTS)
    model.eval()
    task = nc.Task(model, (INPUTS, torch.arange(64) % 4), (INPUTS, torch.arange(64) % 4))
    config = {"quantize": {"method": "ptq", "bits": 8}}
    step = nc.compress(task, config, epochs=0)
    content = step.artifact.content
    assert step.metrics["export_error"] < 0.03
    found = operators(content, str(tmp_path / "optimised.onnx"))
    assert found["QLinearConcat"] == joined
    # The first convolution's output is read as it is and pooled: ONNX Runtime leaves that one in floating point.
    assert found["QLinearConv"] == len(task.spec.compressible_layers) - (1 if block is Signed else 2)
    assert found["QGemm"] == 1
    assert nc.CostModel(task)(config)["size_mb"] * 1e6 == pytest.approx(len(content), rel=0.03)
