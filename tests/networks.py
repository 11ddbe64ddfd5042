"""Small networks of several kinds, for tests."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class PlainNet(nn.Module):
    """Convolutions, a flatten and two linear layers."""

    def __init__(self, widths: tuple[int, ...] = (8, 12), hidden: int = 20) -> None:
        super().__init__()
        channels = (1, *widths)
        self.blocks = nn.Sequential(*(conv(a, b) for a, b in itertools.pairwise(channels)))
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(widths[-1] * 16, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.pool(self.blocks(x)).flatten(1))))


class ResidualNet(nn.Module):
    """A stem, a residual block, a depthwise convolution, and a global average."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv(1, width)
        self.first = conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.depthwise = conv(width, width, groups=width)
        self.expand = conv(width, 2 * width, kernel=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.second(self.first(x)))
        return self.head(self.expand(self.depthwise(x)).mean((2, 3)))


class ConcatNet(nn.Module):
    """Two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv(1, 6)
        self.right = conv(1, 10, kernel=5)
        self.merge = conv(16, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.merge(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3)))


class SequenceNet(nn.Module):
    """A one-dimensional convolution, a recurrent layer, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(8, 12, 3, padding=1), nn.BatchNorm1d(12), nn.ReLU())
        self.rnn = nn.GRU(12, 10, batch_first=True)
        self.hidden = nn.Linear(10, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x.reshape(-1, 8, 8))
        sequence, _ = self.rnn(features.transpose(1, 2))
        return self.head(torch.relu(self.hidden(sequence.mean(1))))


class NormThenReLU(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d` is: a norm that brings its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


NETWORKS = {"plain": PlainNet, "residual": ResidualNet, "concat": ConcatNet, "sequence": SequenceNet}


def with_large_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with random statistics and biases, so that a removed channel matters."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
    return network.eval()
