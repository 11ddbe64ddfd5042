"""Speech, with a transformer: Whisper's encoder as a classifier of spoken digits, on the recordings of `speech`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import speech
import torch
from baseline import Inputs, Split
from case import Budget, Case, Limits, Splits
from ray import tune
from speech import BANDS, CENTRE, FLOOR, FRAMES, SPREAD
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.tasks.calling import map_tensors


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """Whisper's encoder (Radford et al. 2022, arXiv 2212.04356) of four layers of 192, untrained, with a head."""
    from transformers import WhisperConfig, WhisperForAudioClassification

    config = WhisperConfig(
        num_mel_bins=BANDS,
        d_model=192,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=768,
        max_source_positions=FRAMES // 2,
        classifier_proj_size=128,
        num_labels=10,
        # There is no decoder; what follows is checked all the same.
        vocab_size=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperForAudioClassification(config)


def features(power: Tensor) -> Tensor:
    """Logarithms in bands, shape (batch, 64, 96), of power in bands, shape (batch, 1, 64, 96)."""
    return ((power.squeeze(1) + FLOOR).log() - CENTRE) / SPREAD


def augment(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """As for `speech`: moved, louder or softer, with noise and gaps."""

    def changed(logarithms: Tensor) -> Tensor:
        power = ((logarithms * SPREAD + CENTRE).exp() - FLOOR).clamp(min=0).unsqueeze(1)
        return features(speech.augment(power, generator))

    return map_tensors(inputs, changed)


def load(path: Path) -> Splits:
    """The splits of `speech`, as logarithms."""

    def part(split: Split) -> Split:
        return features(split[0]), split[1]

    splits = speech.load(path)
    return Splits(part(splits.train), part(splits.val), part(splits.test))


def start(network: nn.Module, splits: Splits, path: Path) -> nc.Task:
    """The original with its smaller forms."""
    parts = {"train": splits.train, "validation": splits.val, "test": splits.test}
    task = nc.HuggingFaceTask(network, parts, kind="audio_classification", batch_size=CASE.batch_size)
    # Trained from scratch, it learns as fast as networks without attention do.
    task.learning_rates = nc.Task.learning_rates
    return task.elastic()


def space(task: nc.Task) -> dict[str, Any]:
    """Depth, heads and widths of the layers; sparsity of what lies before, between and behind them; distillation."""
    space = nc.compression_space(task)
    groups = {name: domain for name, domain in space["prune"]["sparsity"].items() if ".layers." not in name}
    return {
        **space,
        "prune": {**space["prune"], "sparsity": groups},
        "quantize": {"method": tune.choice(["ptq", "qat", "lsq"]), "bits": 8},
    }


CASE = Case(
    name="speech_transformer",
    load=load,
    build=build,
    original={},
    architecture={},
    augment=augment,
    batch_size=32,
    start=start,
    space=space,
    budget=Budget(
        samples=None,
        epochs=60,
        learning_rate=1e-3,
        trials=60,
        minutes=12,
        trial_epochs=3,
        trial_samples=None,
        copies=3,
        final_epochs=20,
        final_copies=6,
        variants=1,
        limits=Limits(params=0.3, size=0.08, speedup=4.0, drop=0.1, equal=0.002),
    ),
    quick=Budget(
        samples=300,
        epochs=1,
        learning_rate=1e-3,
        trials=2,
        trial_epochs=1,
        trial_samples=None,
        copies=2,
        final_epochs=1,
        final_copies=2,
        variants=1,
        limits=Limits(params=0.6, size=0.5, speedup=1.0, drop=1.0, equal=0.002),
    ),
)
