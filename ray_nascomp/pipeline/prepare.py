"""A candidate made ready for integers: normalisations folded, outliers smoothed, weights rounded."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from ray_nascomp import registry
from ray_nascomp.compression.attention import find_attentions
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.compression.smooth import ALPHAS, Smoothed, smooth
from ray_nascomp.compression.stand_ins import replace_module
from ray_nascomp.compression.static import Rounded, calibrate_layers, quantize_linear
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.outputs import unfollowed_convolutions
from ray_nascomp.deployment.recurrent import lstms_with_floating_inputs, round_recurrent
from ray_nascomp.nni_adapter.evaluator import TrainingFunction, TrainingStep, no_training
from ray_nascomp.nni_adapter.output_forms import OutputForm
from ray_nascomp.nni_adapter.quantization import Calibration, QuantizationSession
from ray_nascomp.pipeline.candidate import Candidate, train_all
from ray_nascomp.tasks.base import Task

_CALIBRATION_SAMPLES = 256


@dataclass
class Prepared:
    """A network whose integers can be simulated and exported.

    Attributes:
        network: On the CPU, in evaluation mode.
        bits: Name of a layer or an embedding of the network -> bits of its weight.
        recurrent: Name of a recurrent layer -> bits of its weights, which are rounded already.
        method: The quantizer.
        scales: Scales that are known before anything is observed.
        floating_inputs: Recurrent layers whose inputs stay in floating point.
        exported: Weights by name as they were when the network was exported.
    """

    network: nn.Module
    bits: dict[str, int]
    recurrent: dict[str, int]
    method: str
    scales: Calibration = field(default_factory=dict)
    floating_inputs: set[str] = field(default_factory=set)
    exported: dict[str, np.ndarray] = field(default_factory=dict)

    def export(self, task: Task) -> onnx.ModelProto:
        """The network as ONNX in floating point.

        Raises:
            ExportError: If no exporter succeeds.
        """
        # Some quantizers leave other weights behind.
        self.exported = {name: weight.copy() for name, weight in self.weights.items()}
        return export_onnx(self.network, task.example_inputs, task.input_names)

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Weights of the quantized layers and embeddings by name."""
        return {
            name: self.network.get_submodule(name).weight.detach().cpu().numpy()  # type: ignore[operator]
            for name in self.bits
        }

    def outputs_to_quantize(self, proto: onnx.ModelProto) -> dict[str, OutputForm]:
        """Layers whose output has to be quantized for the runtime to use integers -> what reads it."""
        weights = self.weights
        return unfollowed_convolutions(proto, weights, [name for name, bits in self.bits.items() if bits == 8])

    def session(self, task: Task, outputs: dict[str, OutputForm]) -> QuantizationSession:
        """The network under simulated integers, as they are without training."""
        own = registry.registered("quantizer").get(self.method)
        if self.method == "ptq" or own is not None:
            scale = own().scale if own is not None else None
            return QuantizationSession(self.network, task, self.bits, outputs, start=self.scales, weight_scale=scale)
        return QuantizationSession(
            self.network, task, self.bits, outputs, train=no_training, method=self.method, start=self.scales or None
        )


def prepare(
    candidate: Candidate, task: Task, known: MutableMapping[tuple[str, int], Rounded] | None = None
) -> Prepared:
    """A copy of the candidate's network, ready; the candidate keeps its own.

    Args:
        candidate: The candidate.
        task: Gives calibration data.
        known: What was found for the same network and the same quantized layers in whatever bits; what "ptq"
            finds is added. Of networks with attention nothing, as their bits decide what is smoothed.
    """
    network = copy.deepcopy(candidate.network).cpu().eval()
    method, scales = candidate.plan.quantize.method, dict(candidate.calibration)
    if candidate.is_prepared:
        smoothed = candidate.smoothed
    elif method == "ptq":
        layers, inputs = _fold(network, candidate, task), _calibration_inputs(task)
        smoothed, scales = quantize_linear(network, layers, inputs) if layers else ({}, scales)
        others = {name: bits for name, bits in candidate.bits.items() if name not in smoothed}
        scales |= calibrate_layers(network, others, inputs, None if layers else known)
    else:
        smoothed = _fold_and_smooth(network, candidate, task)
    recurrent = {
        layer.name: candidate.bits[layer.name]
        for layer in candidate.spec.layers
        if layer.kind == "recurrent" and layer.name in candidate.bits
    }
    floating = lstms_with_floating_inputs(network, recurrent, _calibration_inputs(task)[0]) if recurrent else set()
    round_recurrent(network, recurrent, floating)
    bits = {smoothed.get(name, name): value for name, value in candidate.bits.items() if name not in recurrent}
    return Prepared(network, bits, recurrent, method, scales, floating)


def prepare_for_training(candidate: Candidate, task: Task) -> None:
    """Folds and smooths the candidate's own network, for training with simulated integers; once."""
    if candidate.is_prepared:
        return
    network = candidate.network
    training = network.training
    network.eval()
    candidate.smoothed = _fold_and_smooth(network, candidate, task)
    network.train(training)
    train_all(network)
    candidate.is_prepared = True


def rebuild_prepared(candidate: Candidate, task: Task, smoothed: dict[str, str]) -> None:
    """Gives a network the structure that `prepare_for_training` has left; its weights are still to be loaded."""
    fold_batch_norm(candidate.network, task.example_inputs)
    for name in smoothed:
        layer: Any = candidate.network.get_submodule(name)
        factor = torch.ones(layer.in_features)
        replace_module(candidate.network, name, Smoothed(factor, layer))
    train_all(candidate.network)
    candidate.smoothed = smoothed
    candidate.is_prepared = True


def training_session(
    candidate: Candidate,
    task: Task,
    outputs: dict[str, OutputForm],
    train: TrainingFunction,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, object]],
    step: TrainingStep,
) -> QuantizationSession:
    """The candidate's own network under the plan's quantizer, to be trained."""
    recurrent = {layer.name for layer in candidate.spec.layers if layer.kind == "recurrent"}
    bits = {candidate.smoothed.get(n, n): value for n, value in candidate.bits.items() if n not in recurrent}
    return QuantizationSession(
        candidate.network,
        task,
        bits,
        outputs,
        train,
        optimizer,
        step,
        candidate.plan.quantize.method,
        candidate.calibration or None,
    )


def _fold_and_smooth(network: nn.Module, candidate: Candidate, task: Task) -> dict[str, str]:
    """In place; the names of smoothed layers."""
    layers = _fold(network, candidate, task)
    return smooth(network, layers, _calibration_inputs(task), ALPHAS) if layers else {}


def _fold(network: nn.Module, candidate: Candidate, task: Task) -> list[str]:
    """Folds in place; names of the layers to smooth: those of transformers, whose inputs have outliers."""
    fold_batch_norm(network, task.example_inputs)
    layers = [
        name for name, bits in candidate.bits.items() if bits == 8 and type(network.get_submodule(name)) is nn.Linear
    ]
    return layers if layers and find_attentions(network) else []


def _calibration_inputs(task: Task) -> list[object]:
    return task.calibration_inputs(_CALIBRATION_SAMPLES)
