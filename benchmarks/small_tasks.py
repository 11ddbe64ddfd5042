"""Small trained tasks that benchmarks share: the demo's digits, and a transformer on sentences of movie reviews."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from ray import tune

import ray_nascomp as nc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import DigitsNet, build, load_splits, train_network

_WORDS, _LENGTH = 4000, 24
_SCANS = 942
"""Training scans that are not moved; their moved copies come after them."""


def digits_task() -> nc.Task:
    """The demo's network of 190,000 parameters, without its architecture; trained on from the 942 scans as they are."""
    train, val, _ = load_splits()
    inputs, targets = train
    return nc.Task(train_network(train, epochs=3), (inputs[:_SCANS], targets[:_SCANS]), val)


def joint_task(epochs: int = 6) -> nc.Task:
    """The demo's network with its architecture, trained for some epochs."""
    train, val, _ = load_splits()
    return nc.Task(
        train_network(train, epochs) if epochs else DigitsNet().eval(),
        train,
        val,
        build=build,
        architecture={
            "depth": tune.choice([2, 3, 4]),
            "width": tune.choice([0.5, 0.75, 1.0]),
            "kernel": tune.choice([3, 5]),
        },
    )


def sentence_task(folder: Path) -> nc.Task:
    """A transformer of two layers, trained on 6,000 sentences of movie reviews; 2,000 others judge it.

    Args:
        folder: Holds rt-polarity.pos and rt-polarity.neg.
    """
    from transformers import BertConfig, BertForSequenceClassification

    lines = {
        label: (folder / f"rt-polarity.{end}").read_text(encoding="latin-1").splitlines()
        for label, end in ((1, "pos"), (0, "neg"))
    }
    samples = [(text.split(), label) for label, texts in lines.items() for text in texts[:4000]]
    tokens = torch.zeros(len(samples), _LENGTH, dtype=torch.long)
    for row, (words, _) in enumerate(samples):
        numbers = [1 + zlib.crc32(word.encode()) % (_WORDS - 1) for word in words[:_LENGTH]]
        tokens[row, : len(numbers)] = torch.tensor(numbers)
    labels = torch.tensor([label for _, label in samples])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(samples)))

    def split(rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"input_ids": tokens[rows], "attention_mask": (tokens[rows] > 0).long()}, labels[rows]

    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=_WORDS,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=192,
            max_position_embeddings=_LENGTH,
        )
    )
    train, val = split(order[:6000]), split(order[6000:])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()
    for epoch in range(3):
        for rows in torch.randperm(6000, generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            outputs = model(**{name: tensor[rows] for name, tensor in train[0].items()}).logits
            torch.nn.functional.cross_entropy(outputs, train[1][rows]).backward()
            optimizer.step()
    return nc.HuggingFaceTask(
        model.eval(), {"train": train, "validation": val}, kind="text_classification", batch_size=64
    )
