"""NNI's fused form: pruning, distillation and quantization in one training run.

Each compressor is made from the one before (`from_compressor`) and shares its wrappers and its
training, so that masks, scales and weights adapt to one another.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nni.compression import distillation
from torch import Tensor, nn

from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.nni_adapter.distillation import layer_outputs, relative_entries
from ray_nascomp.nni_adapter.embeddings import RoundedEmbeddings
from ray_nascomp.nni_adapter.evaluator import TrainingFunction, TrainingStep, make_evaluator
from ray_nascomp.nni_adapter.mends import unwrap
from ray_nascomp.nni_adapter.pruning_targets import GroupCounts, read_removed
from ray_nascomp.nni_adapter.quantization import QUANTIZERS, QuantizationSession, quantizer_entries, read_calibration
from ray_nascomp.nni_adapter.scales import Calibration, LayerScales
from ray_nascomp.nni_adapter.scheduled import OptimizerSettings, make_scheduled, schedule_entries
from ray_nascomp.pruners import CHANNEL_METHODS, check_method
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import call


@dataclass(frozen=True)
class FusedResult:
    """What a fused run leaves.

    Attributes:
        removed: Group name -> ascending indices of the removed channels.
        state: The trained weights of all channels, keys as in `model.state_dict()`.
        calibration: Scales of the channels that are left.
    """

    removed: dict[str, list[int]]
    state: dict[str, Tensor]
    calibration: Calibration


def fused_compression(
    model: nn.Module,
    task: Task,
    groups: GroupCounts,
    bits: Mapping[str, int],
    train: TrainingFunction,
    steps: int,
    optimizer: OptimizerSettings,
    training_step: TrainingStep | None = None,
    prune_method: str = "l1_norm",
    schedule: str = "agp",
    quantize_method: str = "qat",
    distill_weight: float = 0.5,
) -> FusedResult:
    """Prunes, distills and quantizes a copy in one training run.

    Args:
        model: The model with batch normalisations folded; its weights stay as they are, and are the
            teacher's.
        task: The task.
        groups: Name -> the group of channels and the number of them to remove, at least one with any.
        bits: Names of layers and embeddings -> bits of their weight; recurrent layers are passed over,
            since NNI has no quantizer for them.
        train: The training: (model, optimizer, step) -> None, called once.
        steps: Over how many of its steps sparsity grows.
        optimizer: Class and arguments of the optimizer.
        training_step: Function (batch, model) -> loss; the task's loss if absent.
        prune_method: A method of `CHANNEL_METHODS` other than "slim".
        schedule: One of `SCHEDULES`.
        quantize_method: A method of `QUANTIZER_BITS` that trains.
        distill_weight: Share of the layer-wise distillation (NNI's dynamic one, each layer with its
            namesake) in the loss, in [0, 1]; 0 distills nothing.

    Returns:
        What to remove, the trained weights, and the scales of what is left.

    Raises:
        ConfigError: For an unknown method or schedule, and for attention heads.
    """
    check_method(prune_method, CHANNEL_METHODS)
    if prune_method == "slim":
        raise ConfigError(
            "fused compression: 'slim' was given, whose factors NNI applies to integers; others are allowed"
        )
    heads = [name for name, (group, _) in groups.items() if group.is_heads]
    if heads:
        raise ConfigError(f"fused compression: heads of {heads} were given; groups of channels are allowed")
    wanted = {name: (group, count) for name, (group, count) in groups.items() if count}
    spec = ModelSpec.from_model(model, task.example_inputs)
    model, teacher = copy.deepcopy(model), copy.deepcopy(model).eval()
    bits = {name: value for name, value in bits.items() if not isinstance(model.get_submodule(name), nn.RNNBase)}
    observing = QuantizationSession(model, task, bits, {})
    observed = observing.calibration()
    observing.close()
    rows = {name: value for name, value in bits.items() if isinstance(model.get_submodule(name), nn.Embedding)}
    layers = {name: value for name, value in bits.items() if name not in rows}
    embeddings = RoundedEmbeddings(model, rows)
    evaluator = make_evaluator(model, task, train, optimizer, training_step)
    config = schedule_entries(model, wanted, prune_method, spec)
    pruner, _ = make_scheduled(prune_method, schedule, model, config, evaluator, steps)
    previous = pruner if not distill_weight else _distiller(pruner, teacher, task, layers, distill_weight)
    entries = quantizer_entries(layers, (), quantize_method, observed)
    quantizer = QUANTIZERS[quantize_method].from_compressor(previous, entries)
    quantizer.start(observed, layers)
    quantizer.compress(steps, None)
    removed = read_removed(pruner.get_masks(), wanted, prune_method, spec)
    calibration = {
        **{name: LayerScales(scale, None, None, rows[name]) for name, scale in embeddings.scales().items()},
        **read_calibration(quantizer, layers),
    }
    quantizer.finish()
    unwrap(quantizer)
    embeddings.close()
    for name, (group, _) in wanted.items():
        for layer in set(group.layers) & set(calibration):
            left = np.delete(calibration[layer].weight, removed[name])
            calibration[layer] = replace(calibration[layer], weight=left)
    return FusedResult(removed, model.state_dict(), calibration)


def _distiller(pruner: Any, teacher: nn.Module, task: Task, layers: Collection[str], weight: float) -> Any:
    outputs = layer_outputs(teacher, task, layers, ())
    return distillation.DynamicLayerwiseDistiller.from_compressor(
        pruner,
        relative_entries({name: [name] for name in outputs}, outputs, weight),
        teacher_model=teacher,
        teacher_predict=lambda batch, wrapped: call(wrapped, batch[0]),
        origin_loss_lambda=1 - weight,
    )
