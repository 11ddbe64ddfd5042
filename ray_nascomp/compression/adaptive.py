"""Adaptive quantization: the bits of each layer of a task, from measured sensitivity and a budget of bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ray_nascomp.compression.bit_allocation import allocate_bits
from ray_nascomp.compression.sensitivity import measure_sensitivity
from ray_nascomp.plan.stages import bits_of
from ray_nascomp.quantizers import bits_for

if TYPE_CHECKING:
    from pathlib import Path

    from ray_nascomp.model_spec import LayerSpec
    from ray_nascomp.tasks.base import Task

_FLOAT_BYTES = 4
_SCALE_BYTES = 4


def adaptive_bits(task: Task, method: str, budget: float, folder: str | Path | None = None) -> dict[str, int]:
    """The bits that add least to the loss within a budget.

    Args:
        task: The task; the loss is that of its own model on calibration data, without training.
        method: A quantizer; it says which bits there are.
        budget: Share of the bytes of all quantizable layers' weights in floating point, in (0, 1].
        folder: Where the measured sensitivities are kept; nowhere if absent.

    Returns:
        Layer name -> bits, 32 where a layer stays in floating point.

    Raises:
        ConfigError: If the budget cannot be met with the method's bits; the message says what can.
    """
    layers = task.spec.quantizable_layers
    offered = [bits for bits in bits_of(method) if bits != 32]
    table = measure_sensitivity(task, sparsities=(), bits=offered, ranks=(), folder=folder).table("bits")
    choices = {layer.name: dict.fromkeys([*(bits_for(layer.kind, bits) for bits in offered), 32]) for layer in layers}
    sensitivity = {name: {bits: 0.0 if bits == 32 else table[name][bits] for bits in choices[name]} for name in choices}
    dense = sum(_bytes(layer, 32) for layer in layers)
    cost = {layer.name: {bits: _bytes(layer, bits) / dense for bits in choices[layer.name]} for layer in layers}
    return allocate_bits(sensitivity, cost, budget)


def _bytes(layer: LayerSpec, bits: int) -> float:
    weights = math.prod(layer.weight_shape)
    if layer.kind == "recurrent":
        weights += layer.fixed_params
    if bits == 32:
        return weights * _FLOAT_BYTES
    return weights * bits / 8 + layer.weight_shape[0] * _SCALE_BYTES
