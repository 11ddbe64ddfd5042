"""The demo's data and network: scans of handwritten digits, and a convolutional network for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

Split = tuple[Tensor, Tensor]

WIDTHS = (32, 64, 96, 96)
KERNELS = (3, 5, 3, 3)


class DigitsNet(nn.Module):
    """Blocks of convolution, batch normalisation and ReLU, a global average, a linear layer.

    Args:
        widths: Channels of each block, 2 to 4 of them.
        kernels: Kernel size of each block, odd.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, kernels: Sequence[int] = KERNELS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        channels = 1
        for width, kernel in zip(widths, kernels, strict=False):
            convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
            self.blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            channels = width
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, 10) for images of shape (batch, 1, 8, 8)."""
        features = images
        for index, block in enumerate(self.blocks):
            features = block(features)
            if index == 1:
                features = self.pool(features)
        return self.head(features.mean((2, 3)))


def build(architecture: dict) -> DigitsNet:
    """The network of an architecture: depth, width as a share of the original's, kernel size."""
    depth = architecture["depth"]
    widths = [round(width * architecture["width"]) for width in WIDTHS[:depth]]
    kernels = [architecture["kernel"] if kernel == 5 else kernel for kernel in KERNELS[:depth]]
    return DigitsNet(widths, kernels)


def load_splits() -> tuple[Split, Split, Split]:
    """Train, validation and test data: 942, 405 and 450 scans of 8 x 8 pixels.

    The training scans come five times: as they are, and moved by a pixel to each side.
    """
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.tensor(labels)
    rest, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    train, val = train_test_split(rest, test_size=0.3, random_state=0, stratify=labels[rest])
    splits = [(inputs[rows], targets[rows]) for rows in (train, val, test)]
    return with_shifts(*splits[0]), splits[1], splits[2]


def with_shifts(images: Tensor, targets: Tensor) -> Split:
    """The images and their copies moved by one pixel up, down, left and right."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    offsets = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    moved = [padded[:, :, top : top + 8, left : left + 8] for top, left in offsets]
    return torch.cat(moved), targets.repeat(len(offsets))


def train_network(data: Split, epochs: int = 6, seed: int = 0) -> DigitsNet:
    """A network trained in the usual way."""
    torch.manual_seed(seed)
    network = DigitsNet()
    inputs, targets = data
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()
    return network.eval()
