"""Networks that shuffle channels (ShuffleNetV2: Ma et al. 2018, arXiv 1807.11164)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.compression.graph import remove_channels


def reshaped(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    halves = x.view(batch, 2, channels // 2, height, width)
    return halves.transpose(1, 2).contiguous().view(batch, channels, height, width)


def merged(x: Tensor) -> Tensor:
    """As the hub of NNI does it."""
    batch, channels, height, width = x.shape
    pairs = x.reshape(batch * channels // 2, 2, height * width).permute(1, 0, 2)
    return torch.cat(tuple(pairs.reshape(2, -1, channels // 2, height, width)), 1)


def stacked(x: Tensor) -> Tensor:
    """What torch-pruning takes for something else, and fails on in deeper networks."""
    return torch.stack(x.chunk(2, 1), 2).flatten(1, 2)


def layer(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(after)
    for values, lower, upper in ((norm.weight, 0.5, 1.5), (norm.bias, -1, 1), (norm.running_mean, -0.5, 0.5)):
        nn.init.uniform_(values, lower, upper)
    return nn.Sequential(convolution, norm, nn.ReLU())


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, shuffle) -> None:
        super().__init__()
        half = after // 2
        self.shuffle = shuffle
        self.short = nn.Sequential(layer(before, before, 3, 2, before), layer(before, half, 1)) if stride == 2 else None
        taken = before if stride == 2 else half
        self.long = nn.Sequential(layer(taken, half, 1), layer(half, half, 3, stride, half), layer(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.short(x), x) if self.short is not None else x.chunk(2, 1)
        return self.shuffle(torch.cat((left, self.long(right)), 1))


SHALLOW = ((8, 16, 2), (16, 16, 1), (16, 32, 2))
DEEP = ((8, 16, 2), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1))


class ShuffleNet(nn.Module):
    def __init__(self, shuffle, blocks) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = layer(3, 8, 3)
        self.blocks = nn.Sequential(*(Block(*sizes, shuffle) for sizes in blocks))
        self.last = layer(32, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


INPUTS = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def make_task(shuffle, blocks=SHALLOW) -> nc.Task:
    data = INPUTS, torch.arange(32) % 5
    return nc.Task(ShuffleNet(shuffle, blocks).eval(), data, data)


@pytest.mark.parametrize("shuffle", [reshaped, merged, stacked])
def test_channels_are_removed_only_where_no_shuffle_follows(shuffle):
    task = make_task(shuffle)
    inner = [f"blocks.{index}.long.0.0" for index in range(3)]
    assert [group.name for group in task.spec.prunable_groups] == ["stem.0", *inner, "last.0"]
    for group in task.spec.prunable_groups:
        removed = [0, 3, group.width - 1]
        masked, smaller = copy.deepcopy(task.model), copy.deepcopy(task.model)
        for name in group.layers:
            norm = masked.get_submodule(name.rpartition(".")[0])[1]
            norm.weight.data[removed] = norm.bias.data[removed] = 0
        remove_channels(smaller, task.example_inputs, {group.name: removed})
        torch.testing.assert_close(smaller(INPUTS), masked(INPUTS), rtol=0, atol=1e-5)
        assert not torch.allclose(masked(INPUTS), task.model(INPUTS), rtol=0, atol=1e-4)


def test_a_network_whose_channels_cannot_be_followed_is_compressed_otherwise():
    task = make_task(stacked, DEEP)
    with pytest.warns(UserWarning, match="channels of ShuffleNet stay whole, all else can be compressed"):
        spec = task.spec
    assert spec.prunable_groups == ()
    assert set(nc.compression_space(task)) == {"finetune", "quantize"}
    config = {"quantize": {"method": "ptq", "bits": 8}, "low_rank": {"rank": 0.5}}
    metrics = nc.compress(task, config, epochs=0).metrics
    costs = nc.CostModel(task)(config)
    assert metrics["feasible"]
    assert metrics["params"] == costs["params"] < sum(p.numel() for p in task.model.parameters())
    with pytest.raises(nc.ConfigError, match="no channels or heads of this model can be removed"):
        nc.compress(task, {"prune": {"method": "l1_norm", "sparsity": 0.5}}, epochs=0)


def test_reshapes_that_keep_channels_are_no_shuffles():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    windows = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4]}
    swin = transformers.SwinForImageClassification(transformers.SwinConfig(**windows, window_size=4, num_labels=3))
    spec = nc.ModelSpec.from_model(swin, torch.randn(2, 3, 32, 32))
    assert {f"swin.encoder.layers.{stage}.blocks.0.mlp.fc1" for stage in (0, 1)} <= set(spec.prunable_names)
