"""What a case's table says of a model: its file judged on the test set, and timed next to the original's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from baseline import Inputs, Split, rows_of
from scipy.stats import binomtest
from torch import nn

from ray_nascomp.deployment.runtime import make_session, measure_latency, run_session

ROUNDS = {1: 25, 32: 5}
"""Batch size -> how often both models are timed."""
THREADS = (1, 2)


@dataclass(frozen=True)
class Judged:
    """A model's file on the test set.

    Attributes:
        content: The ONNX file.
        right: Which of the test samples it gets right.
        figures: What the table shows.
    """

    content: bytes
    right: np.ndarray
    figures: dict[str, Any]


def judge(content: bytes, test: Split, counts: Mapping[str, float]) -> Judged:
    """Runs a file on the test set.

    Args:
        content: The ONNX file.
        test: The test set as the file takes it.
        counts: Its params and macs.

    Returns:
        Among the figures: accuracy, and Wilson's interval of 95% for it.
    """
    inputs, targets = test
    session, names = make_session(content), names_of(inputs, content)
    starts = range(0, len(targets), 64)
    outputs = [run_session(session, rows_of(inputs, slice(low, low + 64)), names) for low in starts]
    # Of sequences every place has to be right.
    right = (np.concatenate(outputs).argmax(-1) == targets.numpy()).reshape(len(targets), -1).all(1)
    low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    figures = {
        "accuracy": float(right.mean()),
        "accuracy_low": float(low),
        "accuracy_high": float(high),
        "bytes": len(content),
        "params": int(counts["params"]),
        "macs": int(counts["macs"]),
    }
    return Judged(content, right, figures)


def names_of(inputs: Inputs, content: bytes) -> list[str]:
    """Names of a file's inputs, in the order of the samples' tensors."""
    return list(inputs) if isinstance(inputs, Mapping) else [entry.name for entry in make_session(content).get_inputs()]


def compare(original: Judged, model: Judged, test: Split) -> dict[str, Any]:
    """Puts a model next to the original.

    Returns:
        The model's figures and how they relate to the original's: `*_share`, `drop`, `p_value` (McNemar's
        exact test on the samples that only one of the two gets right), and milliseconds and speedup
        at each batch size and number of threads.
    """
    lost, won = int((original.right & ~model.right).sum()), int((model.right & ~original.right).sum())
    figures = {
        **model.figures,
        **{f"{name}_share": model.figures[name] / original.figures[name] for name in ("params", "macs", "bytes")},
        "drop": original.figures["accuracy"] - model.figures["accuracy"],
        "lost": lost,
        "won": won,
        "p_value": float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
    }
    return {**figures, **timed(original.content, model.content, test)}


def timed(
    original: bytes, other: bytes | nn.Module, test: Split, milliseconds: str = "ms", speedup: str = "speedup"
) -> dict[str, float]:
    """Median milliseconds of a model and its speedup, at each batch size and number of threads, on the first sample."""
    sample = rows_of(test[0], slice(1))
    names = names_of(sample, original)
    figures = {}
    for batch, rounds in ROUNDS.items():
        for threads in THREADS:
            latency = measure_latency(original, other, sample, names, batch_size=batch, threads=threads, rounds=rounds)
            figures[f"{milliseconds}_batch{batch}_threads{threads}"] = latency.compressed_ms
            figures[f"{speedup}_batch{batch}_threads{threads}"] = latency.speedup
    return figures


def timed_twice(original: bytes, network: nn.Module, test: Split) -> dict[str, float]:
    """The original's times in ONNX Runtime and in torch."""
    in_torch = timed(original, network, test, "torch_ms", "torch_speedup")
    return {**timed(original, original, test), **in_torch}
