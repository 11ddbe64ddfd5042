"""Speech: recordings of spoken digits, a convolutional-recurrent network on a mel spectrogram.

The front end's resolution (mel bands, milliseconds between frames) is a part of the architecture:
the network takes the power in 64 bands every 10 ms, and begins by averaging neighbours.
"""

from __future__ import annotations

import wave
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baseline import Split
from case import Budget, Case, Limits, Splits
from ray import tune
from torch import Tensor, nn

RATE = 8000
BANDS = 64
FRAMES = 96
HOP_MS = 10
_WINDOW = 256
_POINTS = 512
FLOOR = 1e-5
# Mean and standard deviation of the logarithms, roughly.
CENTRE, SPREAD = -7.0, 4.0


class SpeechNet(nn.Module):
    """Convolutions over bands and frames, a recurrent layer over frames, a linear layer.

    Args:
        bands: Mel bands, a divisor of 64.
        hop_ms: Milliseconds from frame to frame, a multiple of 10.
        widths: Channels of the blocks of convolution, batch normalisation, ReLU and pooling.
        cell: "lstm" or "gru".
        hidden: Width of the recurrent layer.
        bidirectional: Whether it also runs backwards.
    """

    def __init__(
        self, bands: int, hop_ms: int, widths: Sequence[int], cell: str, hidden: int, bidirectional: bool
    ) -> None:
        super().__init__()
        self.pooling = (BANDS // bands, hop_ms // HOP_MS)
        self.blocks = nn.ModuleList()
        channels = 1
        for width in widths:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)))
            channels = width
        layer = nn.LSTM if cell == "lstm" else nn.GRU
        features = channels * (bands >> len(widths))
        self.recurrent = layer(features, hidden, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(hidden * (1 + bidirectional), 10)

    def forward(self, power: Tensor) -> Tensor:
        """Logits of shape (batch, 10) for the power in bands, shape (batch, 1, 64, 96)."""
        power = nn.functional.avg_pool2d(power, self.pooling)
        features = ((power + FLOOR).log() - CENTRE) / SPREAD
        for block in self.blocks:
            features = block(features)
        outputs, _ = self.recurrent(features.flatten(1, 2).transpose(1, 2))
        return self.head(outputs.mean(1))


def build(architecture: Mapping[str, Any]) -> SpeechNet:
    """The network of an architecture: `width` is a share of the last convolution's channels."""
    settings = dict(architecture)
    *others, last = (32, 64, 128)[: settings.pop("depth")]
    return SpeechNet(widths=(*others, round(last * settings.pop("width"))), **settings)


def mel_power(recordings: Sequence[np.ndarray]) -> Tensor:
    """The power in mel bands.

    Args:
        recordings: Samples of each recording, at 8 kHz.

    Returns:
        Shape (recordings, 1, 64, 96); recordings are made equally loud, and cut or padded to 0.96 s.
    """
    length = FRAMES * HOP_MS * RATE // 1000
    waves = np.zeros((len(recordings), length), np.float32)
    for row, recording in zip(waves, recordings, strict=True):
        part = recording[:length].astype(np.float32)
        row[: len(part)] = part / max(1.0, float(np.abs(part).max()))
    spectrum = torch.stft(
        torch.from_numpy(waves),
        _POINTS,
        hop_length=HOP_MS * RATE // 1000,
        win_length=_WINDOW,
        window=torch.hann_window(_WINDOW),
        return_complex=True,
    )
    return (_filters() @ spectrum.abs()[..., :FRAMES].square()).unsqueeze(1)


def _filters() -> Tensor:
    """Triangles on the mel scale (O'Shaughnessy 1987), shape (bands, bins)."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    bins = np.linspace(0, RATE / 2, _POINTS // 2 + 1)
    low, middle, high = (edges[start : start + BANDS, None] for start in range(3))
    triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(min=0)
    return torch.from_numpy(triangles / _WINDOW).float()


def augment(power: Tensor, generator: torch.Generator) -> Tensor:
    """Moved in time, louder or softer, with noise, and with a band and a moment left out.

    The gaps are those of SpecAugment (Park et al. 2019, arXiv 1904.08779).
    """
    count = len(power)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    frames, bands = torch.arange(FRAMES), torch.arange(BANDS)
    sources = (frames - drawn(0, 24).long()).clamp(min=-1)
    moved = power.gather(3, sources.clamp(min=0).expand_as(power)) * (sources >= 0)
    moved = moved * (drawn(-1.5, 1.0).exp() + drawn(-0.05, 0.05) * bands[:, None] / 4).clamp(min=0.05)
    moved = moved + drawn(-14, -6).exp() * torch.empty(power.shape).exponential_(generator=generator)
    start, extent = drawn(0, FRAMES).long(), drawn(0, 12).long()
    gap = (frames >= start) & (frames < start + extent)
    start, extent = drawn(0, BANDS).long(), drawn(0, 10).long()
    gap = gap | ((bands[:, None] >= start) & (bands[:, None] < start + extent))
    return moved.masked_fill(gap, 0.0)


def load(path: Path) -> Splits:
    """The Free Spoken Digit Dataset: takes 0-9 of each speaker's digit test, 10-19 validate, the others train.

    Args:
        path: One file .npz of all recordings, or the data set's folder `recordings` of wave files.
    """
    recordings, digits, takes = _from_waves(path) if path.is_dir() else _from_file(path)
    power, targets = mel_power(recordings), torch.from_numpy(digits).long()

    def part(low: int, high: int) -> Split:
        rows = np.flatnonzero((takes >= low) & (takes < high))
        rows = np.random.default_rng(0).permutation(rows)
        return power[rows], targets[rows]

    return Splits(train=part(20, 50), val=part(10, 20), test=part(0, 10))


def _from_file(path: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    with np.load(path) as file:
        samples, offsets = file["samples"], file["offsets"]
        parts = [samples[low:high] for low, high in pairwise(offsets)]
        return parts, file["digit"], file["take"]


def _from_waves(folder: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    names = sorted(folder.glob("*.wav"))
    recordings = []
    for name in names:
        with wave.open(str(name)) as file:
            recordings.append(np.frombuffer(file.readframes(file.getnframes()), np.int16))
    parts = [name.stem.split("_") for name in names]
    digits = np.array([int(digit) for digit, _, _ in parts])
    return recordings, digits, np.array([int(take) for _, _, take in parts])


CASE = Case(
    name="speech",
    load=load,
    build=build,
    original={
        "bands": 64,
        "hop_ms": 10,
        "depth": 3,
        "width": 1.0,
        "cell": "lstm",
        "hidden": 128,
        "bidirectional": True,
    },
    architecture={
        "bands": tune.choice([16, 32, 64]),
        "hop_ms": tune.choice([10, 20, 40]),
        "depth": tune.choice([2, 3]),
        "width": tune.choice([0.5, 1.0]),
        "cell": tune.choice(["lstm", "gru"]),
        "hidden": tune.choice([16, 24, 32, 48, 64]),
        "bidirectional": tune.choice([False, True]),
    },
    augment=augment,
    batch_size=32,
    budget=Budget(
        samples=None,
        epochs=40,
        learning_rate=2e-3,
        trials=60,
        trial_epochs=3,
        trial_samples=None,
        copies=3,
        final_epochs=15,
        final_copies=4,
        variants=3,
        limits=Limits(params=0.1, size=0.03, speedup=5.5, drop=0.02, equal=0.002),
    ),
    quick=Budget(
        samples=500,
        epochs=1,
        learning_rate=2e-3,
        trials=3,
        trial_epochs=1,
        trial_samples=None,
        copies=1,
        final_epochs=1,
        final_copies=1,
        variants=1,
        limits=Limits(params=0.6, size=0.5, speedup=1.0, drop=1.0, equal=0.002),
    ),
)
