"""Bits of each layer under a budget of bytes, by measured sensitivity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ray_nascomp.compression.bit_allocation import allocate_bits
from ray_nascomp.compression.sensitivity import measure_sensitivity
from ray_nascomp.plan import bits_of
from ray_nascomp.quantizers import bits_for

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task

_FLOAT_BITS = 32


def adaptive_bits(task: Task, method: str, budget: float) -> dict[str, int]:
    """The bits that change the outputs on calibration data least.

    Args:
        task: The task.
        method: A quantizer; its bits are the choices.
        budget: Share of the bytes that the layers' weights take in floating point, in (0, 1].

    Returns:
        Layer name -> bits.

    Raises:
        ConfigError: If the budget cannot be met.
    """
    layers = {layer.name: layer for layer in task.spec.quantizable_layers}
    offered = [bits for bits in bits_of(method) if bits < _FLOAT_BITS]
    table = measure_sensitivity(task, sparsities=(), bits=offered, ranks=()).distortions("bits")
    increases, sizes = {}, {}
    for name, layer in layers.items():
        params = math.prod(layer.weight_shape) + layer.fixed_params
        choices = {bits for bits in offered if bits_for(layer.kind, bits) == bits and bits in table.get(name, {})}
        increases[name] = {bits: table[name][bits] for bits in choices} | {_FLOAT_BITS: 0.0}
        sizes[name] = {bits: params * bits / 8 for bits in (*choices, _FLOAT_BITS)}
    whole = sum(size[_FLOAT_BITS] for size in sizes.values())
    shares = {name: {bits: value / whole for bits, value in size.items()} for name, size in sizes.items()}
    return allocate_bits(increases, shares, budget)
