"""What a candidate is worth: quality under simulated integers, and the exported file's bytes and speed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx
import onnxruntime
import torch
from torch import nn

from ray_nascomp.compression.distill import distillation_loss
from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.dense import export_dense
from ray_nascomp.deployment.elsewhere import Timer
from ray_nascomp.deployment.export import ExportError
from ray_nascomp.deployment.qdq import insert_quantization
from ray_nascomp.deployment.recurrent import quantize_recurrent
from ray_nascomp.deployment.runtime import Latency, Sample, make_session, session_predictor, trial_latency
from ray_nascomp.nni_adapter.output_forms import OutputForm
from ray_nascomp.nni_adapter.quantization import Calibration, QuantizationSession
from ray_nascomp.pipeline.prepare import Prepared
from ray_nascomp.tasks.base import Task

_MAX_ERROR = 0.1
"""Largest relative difference (L2) of a file's outputs from the simulated model's, unless rounding does more."""
_SAMPLES = 256
"""Of so many at a time the divergence is computed, in double precision."""
_MOST_OF_NOISE = 1.5
"""Two independent errors of one size differ by its square root of two."""


@dataclass(frozen=True)
class Baseline:
    """The task's own model, measured as every candidate is.

    Attributes:
        value: The metric of the exported file on the validation data.
        outputs: Its outputs on it, shape `(samples, ...)`.
        targets: The targets of that, shape `(samples, ...)`.
        content: The exported file.
        session: A session that runs it.
    """

    value: float
    outputs: torch.Tensor = field(repr=False)
    targets: torch.Tensor = field(repr=False)
    content: bytes = field(repr=False)
    session: onnxruntime.InferenceSession


_baselines: weakref.WeakKeyDictionary[Task, Baseline] = weakref.WeakKeyDictionary()
_references: weakref.WeakKeyDictionary[Task, tuple[torch.Tensor, torch.Tensor]] = weakref.WeakKeyDictionary()
_timers: weakref.WeakKeyDictionary[Task, Timer] = weakref.WeakKeyDictionary()


def baseline_of(task: Task) -> Baseline:
    """The task's baseline, measured once in a process: its own model, or that of the task's original."""
    if task.original is not None:
        return baseline_of(task.original)
    if task not in _baselines:
        content = export_dense(task)
        session = make_session(content)
        outputs, targets = task.outputs(file_predictor(session, task), task.val_data)
        _baselines[task] = Baseline(task.score(outputs, targets), outputs, targets, content, session)
    return _baselines[task]


def _reference(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's outputs on the validation data, and targets; computed once in a process."""
    if task.teacher is (task.original or task):
        baseline = baseline_of(task)
        return baseline.outputs, baseline.targets
    if task not in _references:
        _references[task] = task.outputs(task.predict(task.model), task.val_data)
    return _references[task]


@dataclass(frozen=True)
class Quality:
    """What outputs on the validation data are worth.

    Attributes:
        value: The task's metric.
        divergence: How far they are from the teacher's, as `distillation_loss` has it; 0 or more.
    """

    value: float
    divergence: float


def worst_quality(task: Task) -> Quality:
    """The worst value, and the divergence of outputs that tell nothing: all zero."""
    outputs, _ = _reference(task)
    return Quality(task.worst, _divergence(torch.zeros_like(outputs), task))


def _divergence(outputs: torch.Tensor, task: Task) -> float:
    parts = zip(*(tensor.split(_SAMPLES) for tensor in (outputs, *_reference(task))), strict=True)
    total = sum(
        len(found) * float(distillation_loss(found.double(), known.double(), targets))
        for found, known, targets in parts
    )
    return total / len(outputs)


def time_with(task: Task, timer: Timer) -> None:
    """Has this process time the task's files with a timer rather than itself."""
    _timers[task] = timer


@dataclass(frozen=True)
class Artifact:
    """An exported file and what was measured of it.

    Attributes:
        content: The ONNX file.
        quality: That of the file, run by ONNX Runtime.
        error: Relative difference (L2) of its outputs from those of the simulated model.
        latency: Time at batch size 1 and one thread, next to the original's.
    """

    content: bytes = field(repr=False)
    quality: Quality
    error: float
    latency: Latency


@dataclass(frozen=True)
class Simulation:
    """A network under simulated integers.

    Attributes:
        quality: That of its outputs.
        outputs: The outputs on the validation data, shape `(samples, ...)`.
        calibration: The scales; empty where no layer is quantized.
    """

    quality: Quality
    outputs: torch.Tensor
    calibration: Calibration


def simulate(prepared: Prepared, task: Task, outputs: dict[str, OutputForm]) -> Simulation:
    """The network under simulated integers, without training.

    Raises:
        NonFiniteModelError: If an output is not finite.
    """
    if not prepared.bits:
        return Simulation(*evaluate_with_outputs(prepared.network, task), {})
    session = prepared.session(task, outputs)
    try:
        return simulation_of(session, prepared.network, task)
    finally:
        session.close()


def simulation_of(session: QuantizationSession, wrapped: nn.Module, task: Task) -> Simulation:
    """The network as a quantization session has it now."""
    return Simulation(*evaluate_with_outputs(wrapped, task), session.calibration())


def evaluate_with_outputs(model: nn.Module | onnxruntime.InferenceSession, task: Task) -> tuple[Quality, torch.Tensor]:
    """What a model's outputs on the validation data are worth, and these, shape `(samples, ...)`."""
    predict = task.predict(model) if isinstance(model, nn.Module) else file_predictor(model, task)
    outputs, targets = task.outputs(predict, task.val_data)
    return Quality(task.score(outputs, targets), _divergence(outputs, task)), outputs


def file_predictor(session: onnxruntime.InferenceSession, task: Task) -> Callable[[object], torch.Tensor]:
    """A file as a function from a batch's inputs to outputs; padding is left out where the file takes any length."""
    predict = session_predictor(session, task.input_names)
    if any(isinstance(length, int) for entry in session.get_inputs() for length in entry.shape[1:]):
        return predict
    return lambda inputs: predict(task.without_padding(inputs))


def make_artifact(prepared: Prepared, proto: onnx.ModelProto, simulation: Simulation, task: Task) -> Artifact:
    """Exports, runs and times.

    Args:
        prepared: The network that the scales belong to.
        proto: The network as ONNX in floating point.
        simulation: Its scales, and the outputs that the file's are compared with.
        task: The task.

    Raises:
        ExportError: If the file does not do what the network does.
    """
    content = file_of(prepared, proto, simulation)
    session = make_session(content)
    quality, outputs = evaluate_with_outputs(session, task)
    error = float((outputs - simulation.outputs).norm() / simulation.outputs.norm().clamp(min=1e-12))
    if not error <= _MAX_ERROR and not error <= (noise := _MOST_OF_NOISE * _noise(prepared, simulation, task)):
        raise ExportError(
            f"the exported file's outputs on the validation data differ from the model's by {error:.2g} (relative); "
            f"up to {max(_MAX_ERROR, noise):.2g} is allowed. Does the model branch on its inputs?"
        )
    return Artifact(content, quality, error, latency_of(content, task, session))


def _noise(prepared: Prepared, simulation: Simulation, task: Task) -> float:
    """What the rounding of activations changes in the outputs (relative, L2).

    In a deep network a sum that ends in other last digits is soon rounded otherwise, and some layers later
    so is all: two runs of the same integers differ by as much as either does from floating point.
    """
    _, exact = evaluate_with_outputs(prepared.network, task)
    return float((simulation.outputs - exact).norm() / simulation.outputs.norm().clamp(min=1e-12))


def file_of(prepared: Prepared, proto: onnx.ModelProto, simulation: Simulation) -> bytes:
    """The file with real integers: what a trial exports.

    Args:
        prepared: The network that the scales belong to.
        proto: The network as ONNX in floating point.
        simulation: Its scales.
    """
    if simulation.calibration:
        proto = insert_quantization(proto, prepared.weights, simulation.calibration, prepared.exported)
    if prepared.recurrent:
        proto = quantize_recurrent(proto, prepared.network, prepared.recurrent, prepared.floating_inputs)
    return compact(proto)


def timed(content: bytes, quality: Quality, error: float, task: Task) -> Artifact:
    """A file whose outputs were judged before, timed now."""
    return Artifact(content, quality, error, latency_of(content, task))


def is_timed_elsewhere(task: Task) -> bool:
    """Whether this process has the task's files timed by another."""
    return task in _timers


def latency_of(content: bytes, task: Task, session: onnxruntime.InferenceSession | None = None) -> Latency:
    """Times a file at batch size 1 and one thread, next to the original's.

    Args:
        content: The file.
        task: Its task.
        session: A session that runs the file, if there is one already.
    """
    sample = _sample(task)
    known = _sample(task.original) if task.original is not None else None
    baseline = baseline_of(task)
    if task in _timers:
        return _timers[task](baseline.content, content, sample, known)
    return trial_latency(baseline.session, session or make_session(content), sample, known)


def _sample(task: Task) -> Sample:
    return task.val_data.head(1)[0], tuple(task.input_names)
