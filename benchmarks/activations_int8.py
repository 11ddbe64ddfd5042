"""What activations cost in 8 bits: one mobile network with five of them, next to its own floating point.

    python benchmarks/activations_int8.py --out benchmarks/results

Inverted bottlenecks with squeeze and excitation, as in MobileNetV3-Small (Howard et al. 2019, arXiv:1905.02244),
trained on scans of digits at 96 x 96 pixels; post-training quantization of all layers. Speed is that of the file in
floating point over the file's, one thread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.deployment.runtime import compare_latency, make_session
from ray_nascomp.pipeline.measure import baseline_of

# Kernel, inner channels, outputs, whether channels are gated, stride.
BLOCKS = (
    (3, 16, 16, True, 2), (3, 72, 24, False, 2), (3, 88, 24, False, 1), (5, 96, 40, True, 2), (5, 240, 40, True, 1),
    (5, 240, 40, True, 1), (5, 120, 48, True, 1), (5, 144, 48, True, 1), (5, 288, 96, True, 2), (5, 576, 96, True, 1),
)  # fmt: skip
ACTIVATIONS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "ReLU": (nn.ReLU, nn.Hardsigmoid),
    "ReLU6": (nn.ReLU6, nn.Hardsigmoid),
    "SiLU": (nn.SiLU, nn.Sigmoid),
    "Hardswish": (nn.Hardswish, nn.Hardsigmoid),
    "PReLU": (nn.PReLU, nn.Sigmoid),
}


TRAIN, TRAINED_PIXELS = 1400, 96


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, sigmoid: type[nn.Module]) -> None:
        super().__init__()
        inner = max(8, channels // 4)
        self.layers = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1), sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        return features * self.layers(features.mean((2, 3), keepdim=True))


class Block(nn.Module):
    """An inverted bottleneck."""

    def __init__(self, inputs: int, shape: tuple[int, int, int, bool, int], kinds: Any) -> None:
        super().__init__()
        kernel, inner, outputs, gated, stride = shape
        activation, sigmoid = kinds
        self.is_residual = inputs == outputs and stride == 1
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), activation()),
            nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
            *(nn.BatchNorm2d(inner), activation(), Gate(inner, sigmoid) if gated else nn.Identity()),
            *(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, features: Tensor) -> Tensor:
        made = self.layers(features)
        return features + made if self.is_residual else made


def network_of(kinds: Any) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), kinds[0]()]
    width = 16
    for shape in BLOCKS:
        layers.append(Block(width, shape, kinds))
        width = shape[2]
    layers += [nn.Conv2d(width, 576, 1, bias=False), nn.BatchNorm2d(576), kinds[0](), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 100))


def digits(pixels: int) -> tuple[Tensor, Tensor]:
    """Scans of digits, enlarged."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    large = nn.functional.interpolate(small, size=pixels, mode="bilinear")
    return large.expand(-1, 3, -1, -1), torch.tensor(labels)


def trained(kinds: Any, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    network = network_of(kinds)
    images, labels = digits(TRAINED_PIXELS)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    return network.eval()


def speeds(task: nc.Task, step: Any, images: Tensor) -> dict[str, float]:
    """Speed over the original's at batch sizes of 1 and 8."""
    original, session = baseline_of(task).session, make_session(step.artifact.content)
    return {str(size): compare_latency(original, session, images[:size], task.input_names).speedup for size in (1, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.activations:
        network = trained(ACTIVATIONS[name], options.epochs)
        for pixels in options.pixels:
            images, labels = digits(pixels)
            train, val = (images[:64], labels[:64]), (images[TRAIN:][:128], labels[TRAIN:][:128])
            task = nc.Task(network, train, val, batch_size=16)
            step = nc.compress(task, {"quantize": {"method": "ptq", "bits": 8}}, epochs=0)
            stem = nc.compress(task, {"quantize": {"method": "ptq", "bits": {"*": 8, "0": 32}}}, epochs=0)
            row = {
                "activation": name,
                "pixels": pixels,
                "speed": speeds(task, step, images),
                "speed, first convolution in floating point": speeds(task, stem, images),
                "error": step.metrics["export_error"],
                "accuracy": step.metrics["accuracy"],
                "accuracy_original": task.evaluate(task.predict(network)),
                "size_ratio": step.metrics["size_ratio"],
            }
            rows.append(row)
            print(row, flush=True)
    (options.out / "activations_int8.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
