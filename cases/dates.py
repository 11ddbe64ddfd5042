"""Dates: a small T5 reads dates as people write them in 22 languages, and writes them as 1999-12-31.

The data are made by Babel from the Unicode consortium's formats. The encoder reads characters, the decoder writes
ten. All characters that a date begins with are given when the next one is told: a date counts as right if every
character is, which is when writing one after the other gives the same.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from baseline import Split
from case import Budget, Case, Limits, Splits
from ray import tune
from torch import Tensor, nn

import ray_nascomp as nc

LANGUAGES = (
    *("cs", "da", "de", "en", "es", "et", "fi", "fr", "hr", "hu", "it"),
    *("lt", "lv", "nb", "nl", "pl", "pt", "ro", "sk", "sl", "sv", "tr"),
)
LENGTH = 40
"""Characters of an input."""
_FORMATS = ("medium", "long", "full")
_TRAIN, _VALIDATION, _TEST = 20000, 2000, 4000
_FIRST, _LAST = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
_CHARACTERS = "-0123456789 !\"#'(),./:;" + "abcdefghijklmnopqrstuvwxyz"
_START = 0
_VOCABULARY = 96
_LAYERS = 3


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """T5 (Raffel et al. 2020, arXiv 1910.10683) of width 128, untrained."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=_VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_heads=4,
        num_layers=architecture["encoder_layers"],
        num_decoder_layers=architecture["decoder_layers"],
        dropout_rate=0.0,
        decoder_start_token_id=_START,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


def written(count: int, seed: int) -> list[tuple[str, str]]:
    """Different dates as people write them, and the same as 1999-12-31."""
    from babel.dates import format_date

    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        date = datetime.date.fromordinal(generator.randint(_FIRST, _LAST))
        text = format_date(date, generator.choice(_FORMATS), generator.choice(LANGUAGES)).lower()
        found[text[:LENGTH]] = date.isoformat()
    return list(found.items())


def numbers(text: str) -> list[int]:
    """Characters as tokens: the usual ones by their place, all others by what is left of the vocabulary."""
    others = _VOCABULARY - len(_CHARACTERS) - 1
    return [
        _CHARACTERS.index(character) + 1 if character in _CHARACTERS else len(_CHARACTERS) + 1 + ord(character) % others
        for character in text
    ]


def load(path: Path) -> Splits:
    """The splits, made anew: 20,000 dates train, 2,000 validate, 4,000 test.

    Args:
        path: Not used.
    """
    rows = written(_TRAIN + _VALIDATION + _TEST, 0)
    texts = torch.tensor([(tokens := numbers(text)) + [0] * (LENGTH - len(tokens)) for text, _ in rows])
    targets = torch.tensor([numbers(date) for _, date in rows])
    given = torch.cat([torch.full((len(rows), 1), _START), targets[:, :-1]], 1)
    inputs = {"input_ids": texts, "attention_mask": (texts > 0).long(), "decoder_input_ids": given}

    def part(low: int, high: int) -> Split:
        return {name: tensor[low:high] for name, tensor in inputs.items()}, targets[low:high]

    return Splits(
        train=part(0, _TRAIN), val=part(_TRAIN, _TRAIN + _VALIDATION), test=part(_TRAIN + _VALIDATION, len(rows))
    )


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of dates that are right to the last character."""
    return float((outputs.argmax(-1) == targets).all(1).float().mean())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of all characters."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def start(network: nn.Module, splits: Splits, path: Path) -> nc.Task:
    """The original with its shallower forms."""
    return nc.Task(
        network,
        splits.train,
        splits.val,
        test_data=splits.test,
        metric=accuracy,
        loss=loss,
        build=build,
        architecture=CASE.architecture,
        batch_size=CASE.batch_size,
    )


CASE = Case(
    name="dates",
    load=load,
    build=build,
    original={"encoder_layers": _LAYERS, "decoder_layers": _LAYERS},
    architecture={"encoder_layers": tune.choice([1, 2, 3]), "decoder_layers": tune.choice([1, 2, 3])},
    augment=None,
    batch_size=64,
    start=start,
    budget=Budget(
        samples=None,
        epochs=8,
        learning_rate=2e-3,
        trials=40,
        minutes=12,
        trial_epochs=3,
        trial_samples=8000,
        copies=1,
        final_epochs=10,
        final_copies=1,
        variants=1,
        limits=Limits(params=0.4, size=0.12, speedup=1.5, drop=0.2, equal=0.001),
    ),
    quick=Budget(
        samples=600,
        epochs=1,
        learning_rate=2e-3,
        trials=2,
        trial_epochs=1,
        trial_samples=None,
        copies=1,
        final_epochs=1,
        final_copies=1,
        variants=1,
        limits=Limits(params=0.6, size=0.5, speedup=1.0, drop=1.0, equal=0.001),
    ),
)
