"""Outliers moved from a linear layer's inputs to its weights, so that both fit into 8 bits.

SmoothQuant (Xiao, Lin, Seznec, Wu, Demouth and Han 2022, arXiv 2211.10438): each input feature
is divided by s and the weights that it meets are multiplied by s, with
s = max|x|^alpha / max|w|^(1 - alpha). The division stays a layer of its own, since where a
residual reads the same tensor, no layer before can take it in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ray_nascomp.compression.observe import ObservedInput, observe_inputs, shared_inputs
from ray_nascomp.compression.rounding import affine_range, channel_scales, round_affine, round_nearest
from ray_nascomp.compression.stand_ins import replace_module
from ray_nascomp.errors import ConfigError
from ray_nascomp.nni_adapter.quantization import WEIGHT_LIMIT

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""What `smooth` chooses from where it is to choose."""

_LEAST = 1e-5


class Scale(nn.Module):
    """Multiplies each feature of the last axis by a constant.

    Args:
        factor: Shape `(features,)`.
    """

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor: Tensor
        self.register_buffer("factor", factor)

    def forward(self, inputs: Tensor) -> Tensor:
        """The scaled inputs, of the same shape."""
        return inputs * self.factor


class Smoothed(nn.Sequential):
    """A layer behind the scaling of its inputs; networks that read their layer's weight (T5 does) still find it.

    Args:
        factor: What the inputs are multiplied by, shape `(features,)`.
        layer: The layer, its weight divided by that.
    """

    def __init__(self, factor: Tensor, layer: nn.Module) -> None:
        super().__init__(Scale(factor), layer)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The layer's, as it is multiplied by scaled inputs."""
        return cast(Tensor, self[1].weight)


def smooth(
    network: nn.Module, layers: Iterable[str], batches: Sequence[Any], alpha: float | Sequence[float] = 0.8
) -> dict[str, str]:
    """Puts `Smoothed(1/s, Linear(W * s))` in the place of linear layers.

    In floating point the network's outputs stay what they were. Layers that read the same tensor
    get the same s.

    Args:
        network: The network in evaluation mode; changed in place.
        layers: Names of linear layers.
        batches: Inputs of calibration batches, as the network takes them. In dicts with an
            `attention_mask`, padding is left out.
        alpha: How much of the outliers moves to the weights, 0..1; of several values each layer
            gets the one with which its output changes least under 8 bits.

    Returns:
        Name of each layer -> name of the linear layer that replaces it. Layers whose weight is
        shared, as a head's that is tied to an embedding, are left as they are and out.

    Raises:
        ConfigError: If a layer is not linear, alpha is out of range, or there are no batches.
    """
    names, alphas = smoothable(network, layers, batches), checked_alphas(alpha)
    if not names:
        return {}
    renamed = {}
    for observed in observe_inputs(network, shared_inputs(network, names, batches[0]), batches, with_covariance=False):
        if observed.count:
            renamed.update(smooth_observed(network, observed, alphas)[0])
    return renamed


def checked_alphas(alpha: float | Sequence[float]) -> list[float]:
    """The values of `smooth`'s alpha.

    Raises:
        ConfigError: If one is out of range, or there is none.
    """
    alphas = [float(value) for value in (alpha if isinstance(alpha, Sequence) else (alpha,))]
    if not alphas or not all(0 <= value <= 1 for value in alphas):
        raise ConfigError(f"alpha: {alpha!r} was given, numbers in 0..1 are allowed")
    return alphas


def smoothable(network: nn.Module, layers: Iterable[str], batches: Sequence[Any]) -> list[str]:
    """The layers whose weight is theirs alone.

    Raises:
        ConfigError: If a layer is not linear, or there are no batches.
    """
    names = list(layers)
    for name in names:
        module = network.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ConfigError(f"layers: {name!r} is a {type(module).__name__}, a Linear is allowed")
    if names and not batches:
        raise ConfigError("batches: none were given, at least one is needed to see the layers' inputs")
    return with_own_weights(network, names)


def with_own_weights(network: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those of the layers whose weight no other module has."""
    uses = Counter(
        id(parameter)
        for _, module in network.named_modules(remove_duplicate=False)
        for parameter in module.parameters(recurse=False)
    )
    return [name for name in layers if uses[id(network.get_submodule(name).weight)] == 1]


def smooth_observed(
    network: nn.Module, observed: ObservedInput, alphas: Sequence[float]
) -> tuple[dict[str, str], ObservedInput]:
    """Smooths the layers that read one input, as `smooth` does, and says what reaches them then.

    Args:
        network: The network; changed in place.
        observed: The input, seen at least once.
        alphas: Values to choose from.
    """
    modules: list[Any] = [network.get_submodule(name) for name in observed.layers]
    scales = _choose([module.weight.detach() for module in modules], observed, alphas)
    renamed = {}
    for name, module in zip(observed.layers, modules, strict=True):
        module.weight.data *= scales.to(module.weight)
        replace_module(network, name, Smoothed((1 / scales).to(module.weight), module))
        renamed[name] = f"{name}.1"
    return renamed, observed.scaled(1 / scales)


def _choose(weights: list[Tensor], observed: ObservedInput, alphas: Sequence[float]) -> Tensor:
    """The s with the least error, shape `(features,)`."""
    candidates = [_smoothing(weights, observed, alpha) for alpha in alphas]
    if len(candidates) == 1:
        return candidates[0]
    errors = [0.0] * len(candidates)
    for weight in (weight.float().cpu() for weight in weights):
        exact = observed.rows @ weight.T
        for index, scales in enumerate(candidates):
            errors[index] += _error(weight, exact, observed, scales)
    return candidates[min(range(len(candidates)), key=errors.__getitem__)]


def _smoothing(weights: list[Tensor], observed: ObservedInput, alpha: float) -> Tensor:
    largest = torch.stack([weight.float().cpu().abs().amax(0) for weight in weights]).amax(0).clamp(min=_LEAST)
    scales = observed.magnitude.clamp(min=_LEAST) ** alpha / largest ** (1 - alpha)
    return scales / scales.log().mean().exp()


def _error(weight: Tensor, exact: Tensor, observed: ObservedInput, scales: Tensor) -> float:
    """Squared error of the layer's output under 8 bits, relative to the exact output's square."""
    lowest, highest = (observed.lowest / scales).min(), (observed.highest / scales).max()
    inputs = round_affine(observed.rows / scales, *affine_range(float(lowest), float(highest)))
    scaled = weight * scales
    rounded = round_nearest(scaled, channel_scales(scaled, WEIGHT_LIMIT), WEIGHT_LIMIT)
    return float((inputs @ rounded.T - exact).square().sum() / exact.square().sum().clamp(min=1e-20))
