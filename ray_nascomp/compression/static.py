"""Static 8-bit integers for the linear layers of transformers, straight from calibration data.

NNI's observers see padding and round each weight by itself. Here padding is left out of the
ranges, and the rounding of each weight makes up for the errors of the others, which on
transformers of few bits is worth more than the choice of the ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ray_nascomp.compression.observe import observe_inputs, shared_inputs
from ray_nascomp.compression.rounding import affine_range, channel_scales, round_compensated
from ray_nascomp.compression.smooth import ALPHAS, smooth
from ray_nascomp.errors import ConfigError
from ray_nascomp.nni_adapter.quantization import WEIGHT_LIMIT, ActivationScale, Calibration, LayerScales


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
    renamed = smooth(network, layers, batches, alpha)
    return renamed, calibrate_linear(network, renamed.values(), batches)


def calibrate_linear(network: nn.Module, layers: Iterable[str], batches: Sequence[Any]) -> Calibration:
    """Rounds the weights of linear layers in place and gives the scales of their integers.

    Weights keep to `WEIGHT_LIMIT`; inputs take the range that they have on the data, padding
    left out; outputs stay in floating point.

    Args:
        network: The network in evaluation mode, on the CPU; changed in place.
        layers: Names of linear layers.
        batches: Inputs of calibration batches.
    """
    names = list(layers)
    if not names:
        return {}
    if not batches:
        raise ConfigError("batches: none were given, at least one is needed to see the layers' inputs")
    calibration: Calibration = {}
    for observed in observe_inputs(network, shared_inputs(network, names, batches[0]), batches):
        if not observed.count:
            continue
        scale, zero_point = affine_range(float(observed.lowest.min()), float(observed.highest.max()))
        for name in observed.layers:
            module: Any = network.get_submodule(name)
            scales = channel_scales(module.weight.detach().float(), WEIGHT_LIMIT)
            rounded = round_compensated(module.weight.detach(), scales, WEIGHT_LIMIT, observed.covariance)
            with torch.no_grad():
                module.weight.copy_(rounded)
            calibration[name] = LayerScales(scales.numpy().astype(np.float32), ActivationScale(scale, zero_point), None)
    return calibration
