"""What a case's table says of a model: its file judged on the test set, and timed next to the original's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest
from study import Splits
from torch import nn

from ray_nascomp.deployment.runtime import make_session, measure_latency

BATCHES = (1, 32)
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


def judge(content: bytes, splits: Splits, counts: Mapping[str, float]) -> Judged:
    """Runs a file on the test set.

    Args:
        content: The ONNX file.
        splits: The data.
        counts: Its params and macs.

    Returns:
        Among the figures: accuracy, and Wilson's interval of 95% for it.
    """
    inputs, targets = splits.test
    session = make_session(content)
    (name,) = (entry.name for entry in session.get_inputs())
    outputs = [session.run(None, {name: batch.numpy()})[0] for batch in inputs.split(64)]
    right = np.concatenate(outputs).argmax(1) == targets.numpy()
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


def compare(original: Judged, model: Judged, splits: Splits) -> dict[str, Any]:
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
    return {**figures, **timed(original.content, model.content, splits)}


def timed(
    original: bytes, other: bytes | nn.Module, splits: Splits, milliseconds: str = "ms", speedup: str = "speedup"
) -> dict[str, float]:
    """Median milliseconds of a model and its speedup, at each batch size and number of threads."""
    names = [entry.name for entry in make_session(original).get_inputs()]
    figures = {}
    for batch in BATCHES:
        for threads in THREADS:
            latency = measure_latency(original, other, splits.test[0][:1], names, batch_size=batch, threads=threads)
            figures[f"{milliseconds}_batch{batch}_threads{threads}"] = latency.compressed_ms
            figures[f"{speedup}_batch{batch}_threads{threads}"] = latency.speedup
    return figures


def timed_twice(original: bytes, network: nn.Module, splits: Splits) -> dict[str, float]:
    """The original's times in ONNX Runtime and in torch."""
    in_torch = timed(original, network, splits, "torch_ms", "torch_speedup")
    return {**timed(original, original, splits), **in_torch}
