"""Integers for layers straight from weights and calibration data.

NNI's observers see padding and round each weight by itself. Here padding is left out of the
ranges, and the rounding of each weight of a layer makes up for the errors of the others, which
matters more than the choice of the ranges: MiniLM's sentence embeddings in 8 bits have a cosine of
0.9977 to the original ones with it, and of 0.9961 without.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_nascomp.compression.observe import ObservedInput, are_seen_at_once, observe_inputs, shared_inputs
from ray_nascomp.compression.patches import CONVOLUTIONS, parts_and_width
from ray_nascomp.compression.rounding import (
    affine_range,
    channel_scales,
    error_spread,
    fitted_scales,
    round_compensated,
)
from ray_nascomp.compression.smooth import ALPHAS, checked_alphas, smooth_observed, smoothable, with_own_weights
from ray_nascomp.errors import ConfigError
from ray_nascomp.nni_adapter.quantization import WEIGHT_LIMIT, ActivationScale, Calibration, LayerScales

_MOST_FEATURES = 3200
"""What a layer may read for an output: beyond, compensation takes seconds a layer."""


@dataclass(frozen=True)
class Rounded:
    """A layer's weight at multiples of its scales.

    Attributes:
        weight: The weight, in its own shape.
        scales: The scales.
    """

    weight: Tensor
    scales: LayerScales


def quantize_linear(
    network: nn.Module,
    layers: Iterable[str],
    batches: Sequence[Any],
    alpha: float | Sequence[float] = ALPHAS,
) -> tuple[dict[str, str], Calibration]:
    """Smooths linear layers, rounds their weights in place and gives the scales of their integers.

    Layers whose inputs never reach them on the data are left as they are.

    Args:
        network: The network in evaluation mode, on the CPU; changed in place.
        layers: Names of linear layers.
        batches: Inputs of calibration batches; some hundred samples will do.
        alpha: As in `smooth`.

    Returns:
        Name of each layer -> name of the linear layer that replaces it, and the scales of these.

    Raises:
        ConfigError: As in `smooth`.
    """
    names, alphas = smoothable(network, layers, batches), checked_alphas(alpha)
    renamed: dict[str, str] = {}
    calibration: Calibration = {}
    if not names:
        return renamed, calibration
    for observed in observe_inputs(network, shared_inputs(network, names, batches[0]), batches):
        if observed.count:
            smoothed, seen = smooth_observed(network, observed, alphas)
            own = dict.fromkeys(smoothed.values(), 8)
            calibration.update(_rounded_in_place(network, own, _rounded(network, own.items(), seen)))
            renamed.update(smoothed)
    return renamed, calibration


def calibrate_layers(
    network: nn.Module,
    bits: Mapping[str, int],
    batches: Sequence[Any],
    known: MutableMapping[tuple[str, int], Rounded] | None = None,
) -> Calibration:
    """Rounds the weights of layers in place and gives the scales of their integers.

    With 8 bits inputs become integers too, in the range that they have on the data, padding left out; with
    fewer the weights are merely stored as such. Outputs stay in floating point. Left out are layers that
    the data never reaches, whose weight is shared, or that read more than 3,200 values for an output.

    Args:
        network: The network in evaluation mode, on the CPU; changed in place.
        bits: Name of a layer -> bits of its weight, 1..8; linear layers and convolutions are rounded.
        batches: Inputs of calibration batches; some hundred samples will do.
        known: (layer, bits) -> what was found when the same layers of the same network were rounded before,
            in whatever bits. If something is missing, each layer is added in all bits that any layer has here;
            but for networks of which not all is observed at once, where one layer's bits change what the next reads.

    Raises:
        ConfigError: If there are no batches.
    """
    names = with_own_weights(network, [name for name in bits if _is_in_reach(network.get_submodule(name))])
    if bits and not batches:
        raise ConfigError("batches: none were given, at least one is needed to see the layers' inputs")
    if not names:
        return {}
    wanted = {name: bits[name] for name in names}
    if known is not None and wanted.items() <= known.keys():
        return _rounded_in_place(network, wanted, known)
    groups = shared_inputs(network, names, batches[0])
    kept = known if known is not None and are_seen_at_once(network, groups) else None
    calibration: Calibration = {}
    for observed in observe_inputs(network, groups, batches):
        if not observed.count:
            continue
        own = {name: wanted[name] for name in observed.layers}
        every = list(product(own, sorted(set(wanted.values()))))
        found = _rounded(network, own.items() if kept is None else every, observed)
        calibration.update(_rounded_in_place(network, own, found))
        if kept is not None:
            kept.update(found)
    return calibration


def _is_in_reach(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, *CONVOLUTIONS)) and parts_and_width(layer)[1] <= _MOST_FEATURES


def _rounded(
    network: nn.Module, wanted: Collection[tuple[str, int]], observed: ObservedInput
) -> dict[tuple[str, int], Rounded]:
    """The weights of layers that read one input, each in some bits."""
    assert observed.covariance is not None
    inputs = ActivationScale(*affine_range(float(observed.lowest.min()), float(observed.highest.max())))
    spread = error_spread(observed.covariance) if any(count > 1 for _, count in wanted) else None
    found = {}
    for name, count in wanted:
        weight: Any = network.get_submodule(name).weight
        scales = weight_scales(weight, count, inputs if count == 8 else None)
        if spread is None or count == 1:
            rounded = _nearest(weight, scales)
        else:
            rounded = round_compensated(weight.detach(), torch.from_numpy(scales.weight), scales.limit, spread)
        found[name, count] = Rounded(rounded, scales)
    return found


def _rounded_in_place(
    network: nn.Module, bits: Mapping[str, int], known: Mapping[tuple[str, int], Rounded]
) -> Calibration:
    """Gives layers their rounded weights; returns the scales."""
    calibration: Calibration = {}
    for name, count in bits.items():
        weight: Any = network.get_submodule(name).weight
        weight.data.copy_(known[name, count].weight)
        calibration[name] = known[name, count].scales
    return calibration


def _nearest(weight: Tensor, scales: LayerScales) -> Tensor:
    values = weight.detach().cpu().float().numpy()
    return torch.from_numpy(scales.integers(values) * scales.weight.reshape((-1,) + (1,) * (values.ndim - 1)))


def calibrate_weights(network: nn.Module, bits: Mapping[str, int]) -> Calibration:
    """Rounds weights in place and gives their scales; the layers go on to compute in floating point.

    Args:
        network: The network; changed in place.
        bits: Name of a convolution, linear layer or embedding -> bits of its weight, 1..8.
    """
    calibration: Calibration = {}
    for name, count in bits.items():
        weight: Any = network.get_submodule(name).weight
        calibration[name] = weight_scales(weight, count)
        weight.data.copy_(_nearest(weight, calibration[name]))
    return calibration


def weight_scales(weight: Tensor, bits: int, inputs: ActivationScale | None = None) -> LayerScales:
    """Scales of a weight with output channels, or an embedding's rows, first.

    Args:
        weight: The weight.
        bits: Bits of its integers, 1..8.
        inputs: Scale of the layer's inputs; None where it computes in floating point.
    """
    values = weight.detach().cpu().float()
    is_limited = bits == 8 and inputs is not None
    scales = channel_scales(values, WEIGHT_LIMIT) if is_limited else fitted_scales(values, bits)
    return LayerScales(scales.numpy().astype(np.float32), inputs, None, bits)
