from __future__ import annotations

import torch
from candidates import candidate_of
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.model_spec import ModelSpec

IMAGES = torch.randn(32, 3, 8, 8)


def costs_equal_the_network(network: nn.Module) -> nc.Task:
    task = nc.Task(network, (IMAGES, torch.arange(32) % 3), (IMAGES, torch.arange(32) % 3))
    config = {"prune": {"method": "l1_norm", "sparsity": 0.25}}
    candidate = candidate_of(task, config)
    assert nc.CostModel(task)(config)["params"] == sum(p.numel() for p in candidate.network.parameters())
    return task


class DepthwiseOfTwo(nn.Module):
    """A depthwise convolution over the channels of two others, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 16, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.head = nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(torch.cat([self.left(x), self.right(x)], 1))).mean((2, 3))


def test_a_depthwise_convolution_follows_all_groups_of_a_concatenation() -> None:
    task = costs_equal_the_network(DepthwiseOfTwo().eval())
    groups = {group.name: (group.width, group.layers, group.prunable) for group in task.spec.groups}
    assert groups["left"] == (8, ("left",), True)
    assert groups["right"] == (16, ("right",), True)
    depthwise = next(layer for layer in task.spec.layers if layer.name == "depthwise")
    assert depthwise.out_group is None
    assert dict(depthwise.in_groups) == {"left": 1, "right": 1}


class TiedHalves(nn.Module):
    """One layer's channels are added to those of two others, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.whole = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(3, 16, 1)
        self.last = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], 1) + self.whole(x)
        return self.head(torch.relu(self.last(both))).mean((2, 3))


def test_layers_tied_by_a_part_of_their_channels_stay_whole() -> None:
    task = costs_equal_the_network(TiedHalves().eval())
    assert list(task.spec.prunable_names) == ["last"]


class Unused(nn.Module):
    """A layer runs, and nothing comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unused = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.head(torch.relu(self.stem(x))).mean((2, 3))


def test_a_layer_that_nothing_reads_is_not_quantized() -> None:
    spec = ModelSpec.from_model(Unused().eval(), IMAGES)
    assert list(spec.quantizable_names) == ["stem", "head"]
    assert spec.extra_macs == 0
    task = costs_equal_the_network(Unused().eval())
    assert nc.compress(task, {"quantize": {"bits": 8}}, epochs=0).metrics["feasible"]
