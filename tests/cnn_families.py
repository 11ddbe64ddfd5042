"""Small convolutional networks: one written by hand, and HuggingFace's families made from their configs."""

from __future__ import annotations

from typing import Any

import torch
from networks import with_large_weights
from torch import Tensor, nn

SIZE = 32


class Residual(nn.Module):
    """Two convolutions whose result is added to the input."""

    def __init__(self, width: int, inner: int, kernel: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class OwnNet(nn.Module):
    """A stem with a large kernel, two stages of residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, stride=2, padding=3), nn.BatchNorm2d(16), nn.ReLU())
        self.first = nn.Sequential(*(Residual(16, 24, 5) for _ in range(2)))
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
        self.second = nn.ModuleList(Residual(32, 48, 3) for _ in range(2))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.first(self.stem(x)))
        for block in self.second:
            x = block(x)
        return self.head(x.mean((2, 3)))


# Family -> config class, its arguments, model class; blocks that can be left out.
CNNS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "own": ("", {}, "", 4),
    "resnet": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"},
        "ResNetForImageClassification",
        3,
    ),
    "bottleneck": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "bottleneck"},
        "ResNetForImageClassification",
        2,
    ),
    "mobilenet_v1": ("MobileNetV1Config", {"depth_multiplier": 0.25}, "MobileNetV1ForImageClassification", 0),
    "mobilenet_v2": ("MobileNetV2Config", {"depth_multiplier": 0.35}, "MobileNetV2ForImageClassification", 10),
}


def make_cnn(family: str) -> tuple[nn.Module, Any]:
    """A model of three classes in evaluation mode, and inputs of two samples."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, SIZE, SIZE)
    config_class, arguments, model_class, _ = CNNS[family]
    if not config_class:
        return with_large_weights(OwnNet()), images
    import transformers

    config = getattr(transformers, config_class)(**arguments, num_labels=3)
    model = with_large_weights(getattr(transformers, model_class)(config))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # As these are made, images make no difference to the outputs.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model, {"pixel_values": images}
