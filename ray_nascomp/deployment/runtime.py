"""Running files and networks on a task's batches, and timing two of them side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from torch import nn

from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.calling import batch_size_of, call, map_tensors, tensors_of

Model: TypeAlias = bytes | str | Path | nn.Module
"""A file's content or path, run by ONNX Runtime, or a network, run by torch."""

Sample: TypeAlias = tuple[Any, Sequence[str]]
"""A batch's inputs, as a model takes them, and the names of its file's inputs."""

Runnable: TypeAlias = onnxruntime.InferenceSession | nn.Module

_ROUND_SECONDS = 0.004
_LEAST_ROUNDS = 5
_ENOUGH = 0.01
"""Relative standard error of the speedup that trials measure; from one minute to the next it differs by more."""
# Where that clock is too coarse for a round, it is of no use.
_HAS_THREAD_TIME = hasattr(time, "thread_time") and time.get_clock_info("thread_time").resolution < 1e-5
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def make_session(model: bytes | str | Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        model: A file's path or its content.
        threads: Number of threads.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # What fails is raised.
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, inputs: Any, names: Sequence[str]) -> np.ndarray:
    """The first output for a batch's inputs.

    Args:
        session: The session.
        inputs: A batch's inputs, as the model takes them.
        names: Names of the file's inputs, in the order of the inputs; those of a dict have their own.
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


def measure_latency(
    original: Model,
    compressed: Model,
    inputs: Any,
    names: Sequence[str] = (),
    *,
    batch_size: int = 1,
    threads: int = 1,
    rounds: int = 25,
) -> Latency:
    """Times two models in turn, files in ONNX Runtime and networks in torch.

    Args:
        original: The model that the speedup is relative to: a file's path or content, or a network.
        compressed: The model that is judged, likewise.
        inputs: A batch's inputs, as the model takes them; repeated or cut to `batch_size` samples.
        names: Names of the files' inputs.
        batch_size: Samples in a run.
        threads: Threads of either runtime.
        rounds: Number of rounds, as in `compare_latency`.

    Raises:
        ConfigError: If `batch_size`, `threads` or `rounds` is not positive.
    """
    for name, value in (("batch_size", batch_size), ("threads", threads), ("rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{name}: {value!r} was given, a positive number is allowed")
    rows = torch.arange(batch_size) % batch_size_of(inputs)
    batch = map_tensors(inputs, lambda tensor: tensor[rows])
    first, second = (
        model if isinstance(model, nn.Module) else make_session(model, threads) for model in (original, compressed)
    )
    with _torch_threads(threads):
        return compare_latency(first, second, batch, names, rounds)


def compare_latency(
    original: Runnable,
    compressed: Runnable,
    inputs: Any,
    names: Sequence[str],
    rounds: int = 25,
    enough: float = 0.0,
    original_sample: Sample | None = None,
) -> Latency:
    """Times two sessions or networks in turn on the same samples.

    Each round runs each of the two for at least four milliseconds, one directly after the
    other, so that a slow moment of the machine meets both; medians over rounds are reported.
    Where both run on one thread, what counts is the thread's processor time, so that other
    programs on the machine matter less; with several threads it is the time on the wall.

    Args:
        original: The model that the speedup is relative to.
        compressed: The model that is judged.
        inputs: A batch's inputs.
        names: Names of the files' inputs.
        rounds: Number of rounds.
        enough: Relative standard error of the speedup, in [0, 1], at which it ends before all rounds.
        original_sample: The inputs and names of the original, where it reads samples otherwise.
    """
    models = (original, compressed)
    sample = (inputs, names)
    clock = time.thread_time if _HAS_THREAD_TIME and all(map(_is_single_threaded, models)) else time.perf_counter
    runs = [_timed(original, *(original_sample or sample), clock), _timed(compressed, *sample, clock)]
    repeats = []
    for run in runs:
        run(2)
        repeats.append(max(1, int(_ROUND_SECONDS / max(run(1), 1e-6))))
    times: list[list[float]] = []
    while len(times) < rounds and (len(times) < _LEAST_ROUNDS or _error(_ratios(times)) > enough):
        times.append([run(count) / count for run, count in zip(runs, repeats, strict=True)])
    ratios = _ratios(times)
    original_ms, compressed_ms = np.median(times, axis=0) * 1e3
    return Latency(float(original_ms), float(compressed_ms), float(np.median(ratios)), _spread(ratios))


def trial_latency(
    original: Runnable, compressed: Runnable, sample: Sample, original_sample: Sample | None = None
) -> Latency:
    """`compare_latency` as trials have it, which ends once the speedup is known to 1%."""
    return compare_latency(original, compressed, *sample, enough=_ENOUGH, original_sample=original_sample)


def _ratios(times: Sequence[Sequence[float]]) -> np.ndarray:
    """Shape `(rounds,)` for times of shape `(rounds, 2)`."""
    first, second = np.transpose(times)
    return first / second


def _spread(values: np.ndarray) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low)


def _error(values: np.ndarray) -> float:
    """Relative standard error of the median, as that of a normal distribution with the same quartiles."""
    return 0.93 * _spread(values) / math.sqrt(len(values)) / float(np.median(values))


def _timed(model: Runnable, inputs: Any, names: Sequence[str], clock: Callable[[], float]) -> Callable[[int], float]:
    if isinstance(model, nn.Module):
        model.eval()
        run_once: Callable[[], Any] = partial(call, model, inputs)
    else:
        run_once = partial(model.run, None, _feed(model, inputs, names))

    def run(count: int) -> float:
        with torch.inference_mode():
            start = clock()
            for _ in range(count):
                run_once()
            return clock() - start

    return run


def _is_single_threaded(model: Runnable) -> bool:
    if isinstance(model, nn.Module):
        return torch.get_num_threads() == 1
    return bool(model.get_session_options().intra_op_num_threads == 1)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Within it torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _feed(session: onnxruntime.InferenceSession, inputs: Any, names: Sequence[str]) -> Mapping[str, np.ndarray]:
    tensors = tensors_of(inputs)
    if not isinstance(inputs, Mapping):
        tensors = dict(zip(names, tensors.values(), strict=True))
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    # A file may lack an input that the model ignores, and take another precision than a float64 model.
    wanted = {entry.name: _TYPES.get(entry.type) for entry in session.get_inputs()}
    return {
        name: array.astype(wanted[name] or array.dtype, copy=False) for name, array in arrays.items() if name in wanted
    }
