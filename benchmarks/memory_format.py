"""What channels last in memory save of an epoch of fine-tuning on a processor.

    python benchmarks/memory_format.py --out benchmarks/results/memory_format.json

Random samples and weights, one thread, seconds of the processor. The two orders take turns, epoch by epoch, so that a
busy machine slows both alike; medians are told, and how many times as fast channels last are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from digits import DigitsNet
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import ray_nascomp as nc
from ray_nascomp.pipeline.memory_format import is_faster_channels_last
from ray_nascomp.pipeline.training import Trainer
from ray_nascomp.plan import FinetuneStage


def spectrograms() -> nn.Module:
    """Three convolutions on a spectrogram."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def resnet(widths: list[int]) -> nn.Module:
    """ResNet-10 of these widths, with transformers' coarse first convolution."""
    depths = [1] * len(widths)
    config = ResNetConfig(
        embedding_size=widths[0], hidden_sizes=widths, depths=depths, layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def convnext() -> nn.Module:
    """ConvNeXt of five blocks."""
    config = ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[32, 64, 128, 256], num_labels=10)
    return ConvNextForImageClassification(config)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "the demo's": (DigitsNet, (1, 8, 8), 1024),
    "three convolutions on a spectrogram": (spectrograms, (1, 64, 100), 64),
    "ResNet-10, 64 to 512": (lambda: resnet([64, 128, 256, 512]), (3, 96, 96), 32),
    "ResNet-10, 13 to 97": (lambda: resnet([13, 27, 51, 97]), (3, 96, 96), 64),
    "MobileNetV2": (lambda: MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=10)), (3, 64, 64), 64),
    "ConvNeXt": (convnext, (3, 64, 64), 64),
}
"""Name -> the network, shape and number of samples."""


def epochs(task: nc.Task, rounds: int) -> dict[bool, float]:
    """Median seconds of an epoch with channels first and last; the first round warms up and does not count."""
    assert is_faster_channels_last(task.model, task)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for is_last, measured in seconds.items():
            trainer = Trainer(task, FinetuneStage(), rounds + 1, 0)
            trainer.is_channels_last = is_last
            optimizer = trainer.make_optimizer(task.model)
            start = time.process_time()
            trainer.epoch(task.model, optimizer, 0)
            if number:
                measured.append(time.process_time() - start)
    return {is_last: statistics.median(measured) for is_last, measured in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record = {}
    for name, (make, shape, count) in NETWORKS.items():
        data = torch.rand(count, *shape), torch.randint(10, (count,))
        medians = epochs(nc.Task(make(), data, data, batch_size=32), arguments.rounds)
        record[name] = {
            "seconds": {"first": round(medians[False], 4), "last": round(medians[True], 4)},
            "times_as_fast": round(medians[False] / medians[True], 3),
        }
        print(name, record[name], flush=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
