"""Integers for layers straight from weights and calibration data.

NNI's observers see padding and round each weight by itself. Here padding is left out of the
ranges, and the rounding of each weight of a layer makes up for the errors of the others, which
matters more than the choice of the ranges: MiniLM's sentence embeddings in 8 bits have a cosine of
0.9977 to the original ones with it, and of 0.9961 without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_nascomp.compression.observe import ObservedInput, observe_inputs, shared_inputs
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
            calibration.update(_round_layers(network, dict.fromkeys(smoothed.values(), 8), seen))
            renamed.update(smoothed)
    return renamed, calibration


def calibrate_layers(network: nn.Module, bits: Mapping[str, int], batches: Sequence[Any]) -> Calibration:
    """Rounds the weights of layers in place and gives the scales of their integers.

    With 8 bits inputs become integers too, in the range that they have on the data, padding left out; with
    fewer the weights are merely stored as such. Outputs stay in floating point. Left out are layers that
    the data never reaches, whose weight is shared, or that read more than 3,200 values for an output.

    Args:
        network: The network in evaluation mode, on the CPU; changed in place.
        bits: Name of a layer -> bits of its weight, 1..8; linear layers and convolutions are rounded.
        batches: Inputs of calibration batches; some hundred samples will do.

    Raises:
        ConfigError: If there are no batches.
    """
    names = with_own_weights(network, [name for name in bits if _is_in_reach(network.get_submodule(name))])
    if bits and not batches:
        raise ConfigError("batches: none were given, at least one is needed to see the layers' inputs")
    calibration: Calibration = {}
    for observed in observe_inputs(network, shared_inputs(network, names, batches[0]), batches) if names else ():
        if observed.count:
            calibration.update(_round_layers(network, {name: bits[name] for name in observed.layers}, observed))
    return calibration


def _is_in_reach(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, *CONVOLUTIONS)) and parts_and_width(layer)[1] <= _MOST_FEATURES


def _round_layers(network: nn.Module, bits: Mapping[str, int], observed: ObservedInput) -> Calibration:
    """Rounds the weights of layers that read one input, in place."""
    assert observed.covariance is not None
    inputs = ActivationScale(*affine_range(float(observed.lowest.min()), float(observed.highest.max())))
    spread = error_spread(observed.covariance) if max(bits.values()) > 1 else None
    calibration: Calibration = {}
    for name, count in bits.items():
        weight: Any = network.get_submodule(name).weight
        calibration[name] = found = weight_scales(weight, count, inputs if count == 8 else None)
        if spread is None or count == 1:
            rounded = _nearest(weight, found)
        else:
            rounded = round_compensated(weight.detach(), torch.from_numpy(found.weight), found.limit, spread)
        weight.data.copy_(rounded)
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
