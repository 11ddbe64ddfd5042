"""ONNX Runtime sessions: running a file on a task's batches, and timing files side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from ray_nascomp.tasks.calling import tensors_of

_ROUND_SECONDS = 0.004


def make_session(model: bytes | str | Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        model: A file's path or its content.
        threads: Number of threads.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, inputs: Any, names: Sequence[str]) -> np.ndarray:
    """The first output for a batch's inputs.

    Args:
        session: The session.
        inputs: A batch's inputs, as the model takes them.
        names: Names of the file's inputs, in the order of the inputs.
    """
    return session.run(None, _feed(session, inputs, names))[0]


def session_predictor(session: onnxruntime.InferenceSession, names: Sequence[str]) -> Callable[[Any], torch.Tensor]:
    """The session as a function from a batch's inputs to outputs, for `Task.evaluate`."""
    return lambda inputs: torch.from_numpy(run_session(session, inputs, names))


@dataclass(frozen=True)
class Latency:
    """How long a file takes, next to the original in the same process.

    Attributes:
        original_ms: Median milliseconds of the original.
        compressed_ms: Median milliseconds of the compressed file.
        speedup: Median over rounds of original time over compressed time.
        spread: Interquartile range of that ratio.
    """

    original_ms: float
    compressed_ms: float
    speedup: float
    spread: float


def compare_latency(
    original: onnxruntime.InferenceSession,
    compressed: onnxruntime.InferenceSession,
    inputs: Any,
    names: Sequence[str],
    rounds: int = 25,
) -> Latency:
    """Times two sessions in turn on the same inputs.

    Each round runs each of the two for at least four milliseconds, one directly after the
    other, so that a slow moment of the machine meets both; medians over rounds are reported.

    Args:
        original: The model that the speedup is relative to.
        compressed: The model that is judged.
        inputs: A batch's inputs.
        names: Names of the files' inputs.
        rounds: Number of rounds.
    """
    runs = [_timed(session, _feed(session, inputs, names)) for session in (original, compressed)]
    repeats = []
    for run in runs:
        run(2)
        repeats.append(max(1, int(_ROUND_SECONDS / max(run(1), 1e-6))))
    times = np.array([[run(count) / count for run, count in zip(runs, repeats, strict=True)] for _ in range(rounds)])
    ratios = times[:, 0] / times[:, 1]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    original_ms, compressed_ms = np.median(times, axis=0) * 1e3
    return Latency(float(original_ms), float(compressed_ms), float(middle), float(high - low))


def _timed(session: onnxruntime.InferenceSession, feed: Mapping[str, np.ndarray]) -> Callable[[int], float]:
    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            session.run(None, feed)
        return time.perf_counter() - start

    return run


def _feed(session: onnxruntime.InferenceSession, inputs: Any, names: Sequence[str]) -> Mapping[str, np.ndarray]:
    wanted = {entry.name for entry in session.get_inputs()}
    tensors = tensors_of(inputs).values()
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
    return {name: array for name, array in arrays.items() if name in wanted}
