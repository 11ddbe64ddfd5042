"""Image: Fashion-MNIST, ResNet-10 at half its width."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baseline import Split
from case import Budget, Case, Limits, Splits
from ray import tune
from torch import Tensor, nn

import ray_nascomp as nc

WIDTHS = (32, 64, 128, 256)
_VALIDATION = 5000
_WIDE = ("stages.2", "stages.3")
# Mean and standard deviation of the training images.
_CENTRE, _SPREAD = 0.286, 0.353


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            convolution = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, features: Tensor) -> Tensor:
        """Features of shape (batch, width, height / stride, width / stride)."""
        inner = self.first_norm(self.first(features)).relu()
        return (self.second_norm(self.second(inner)) + self.shortcut(features)).relu()


class ImageNet(nn.Module):
    """A residual network for grey images.

    Args:
        widths: Channels of each stage; each but the first halves the resolution.
        depths: Blocks of each stage.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.ModuleList()
        channels = widths[0]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for number in range(depth):
                blocks.append(Block(channels, width, 2 if index and not number else 1))
                channels = width
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, 10) for images of shape (batch, 1, 28, 28)."""
        features = self.stem_norm(self.stem(images)).relu()
        for stage in self.stages:
            features = stage(features)
        return self.head(features.mean((2, 3)))


def build(architecture: Mapping[str, Any]) -> ImageNet:
    """The network of an architecture: with or without the first stage and the last."""
    return ImageNet(WIDTHS, (architecture["depth0"], 1, 1, architecture["depth3"]))


def space(task: nc.Task) -> dict[str, Any]:
    """Sparsity of each group, distillation and quantizer; rank and 4 bits where they save bytes.

    They save no time: so only the wide layers at low resolution get the choice, which hold most of the weights. The
    first convolution reads one channel, for which integers may be slower: it gets the choice of floating point.
    """
    space = nc.compression_space(task)
    wide = [name for name in task.spec.factorisable_names if name.startswith(_WIDE)]
    ranks = {name: tune.choice([0.25, 0.5, 1.0]) for name in wide}
    bits = {**dict.fromkeys(task.spec.quantizable_names, 8), **{name: tune.choice([4, 8]) for name in wide}}
    bits["stem"] = tune.choice([8, 32])
    return {**space, "low_rank": {"rank": ranks, "round_to": 8}, "quantize": {**space["quantize"], "bits": bits}}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored or not, and moved by up to two pixels."""
    count, size = len(images), images.shape[-1]
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    padded = nn.functional.pad(images, (2, 2, 2, 2), value=-_CENTRE / _SPREAD)
    top, left = torch.randint(0, 5, (2, count, 1, 1), generator=generator)
    place = torch.arange(size)
    return padded[torch.arange(count)[:, None, None], 0, top + place[:, None], left + place].unsqueeze(1)


def load(folder: Path) -> Splits:
    """Fashion-MNIST; of the training images the last 5,000 in a drawn order validate.

    Args:
        folder: The four files as the data set's authors give them, such as train-images-idx3-ubyte.gz.
    """
    images, labels = _read(folder, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = order[:-_VALIDATION], order[-_VALIDATION:]
    return Splits((images[train], labels[train]), (images[val], labels[val]), _read(folder, "t10k"))


def _read(folder: Path, part: str) -> Split:
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(folder / f"{part}-{kind}-ubyte.gz") as file:
            arrays.append(np.frombuffer(file.read(), np.uint8, offset=header))
    images = torch.from_numpy(arrays[0].reshape(-1, 1, 28, 28) / np.float32(255))
    return (images - _CENTRE) / _SPREAD, torch.from_numpy(arrays[1].astype(np.int64))


CASE = Case(
    name="image",
    load=load,
    build=build,
    original={"depth0": 1, "depth3": 1},
    architecture={"depth0": tune.choice([0, 1]), "depth3": tune.choice([0, 1])},
    space=space,
    augment=augment,
    batch_size=64,
    budget=Budget(
        samples=None,
        epochs=10,
        learning_rate=4e-3,
        trials=64,
        minutes=22,
        trial_epochs=3,
        trial_samples=10000,
        copies=1,
        final_epochs=10,
        final_copies=3,
        variants=1,
        limits=Limits(params=0.15, size=0.04, speedup=5.5, drop=0.05, equal=0.001),
    ),
    quick=Budget(
        samples=1000,
        epochs=1,
        learning_rate=4e-3,
        trials=3,
        trial_epochs=1,
        trial_samples=500,
        copies=1,
        final_epochs=1,
        final_copies=1,
        variants=1,
        limits=Limits(params=0.6, size=0.5, speedup=1.0, drop=1.0, equal=0.001),
    ),
)
