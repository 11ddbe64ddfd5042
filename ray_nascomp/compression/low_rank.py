"""Layers as products of smaller ones: SVD for linear layers and embeddings, Tucker-2 for convolutions.

Linear layers and embeddings lose what their inputs miss least: the SVD is taken of the weight times
a root of the inputs' second moments (DRONE, Chen et al. 2021, NeurIPS 34; SVD-LLM, Wang et al. 2024,
arXiv 2403.07378); those of an embedding are its tokens' frequencies. Convolutions follow Kim et al.
2016, arXiv 1511.06530. The shapes come from `ray_nascomp.costs.factor_shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ray_nascomp.compression.decomposition import (
    energies,
    root_of,
    split_embedding,
    split_matrix,
    tucker,
    unfold,
    weigh_tokens,
)
from ray_nascomp.compression.graph import modules_with_tied_weights
from ray_nascomp.compression.patches import CONVOLUTIONS
from ray_nascomp.compression.stand_ins import replace_module
from ray_nascomp.costs.factor_shapes import max_rank, ranks_of_conv
from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import LayerKind
from ray_nascomp.tasks.calling import call as call_model
from ray_nascomp.tasks.calling import device_of, map_tensors

_TABLE = ("padding_idx", "num_embeddings")


class Factorised(nn.Sequential):
    """A low-rank layer: its factors in the order in which they are applied.

    Networks read attributes of their layers (T5 the weight's dtype, Whisper a stride), so the
    original's are still there.

    Args:
        original: The layer whose place it takes.
        factors: The smaller layers.
    """

    def __init__(self, original: nn.Module, factors: Iterable[nn.Module]) -> None:
        super().__init__(*factors)
        for name in ("stride", "padding", "dilation", "kernel_size", "padding_mode", "groups", *_TABLE):
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))
        self.train(original.training)

    @property
    def weight(self) -> Tensor:
        """An embedding's table, multiplied out; of other layers the last factor's, for its type and device."""
        if isinstance(self[0], nn.Embedding):
            return self.dense_weight()
        # Where its inputs are smoothed, the last factor is a sequence that ends with a layer.
        last = [module for module in self[-1].modules() if hasattr(module, "weight")][-1]
        return cast(Tensor, last.weight)

    def dense_weight(self) -> Tensor:
        """The weight that the factors stand for, of the original's shape."""
        first, *rest = (cast(Tensor, factor.weight) for factor in self)
        if isinstance(self[0], nn.Embedding):
            return first @ rest[0].T
        for weight in rest:
            first = torch.einsum("or...,ri...->oi...", weight, first)
        return first

    @property
    def bias(self) -> Tensor | None:
        """The bias, the last factor's."""
        return cast("Tensor | None", getattr(self[-1], "bias", None))


def factorisable_layers(model: nn.Module) -> dict[str, LayerKind]:
    """The layers that have a low-rank form: name -> "linear", "embedding" or "conv".

    Left out are convolutions with groups, layers whose weight or module stands in two places,
    and whatever is not exactly a torch layer: a subclass may use its weight in its own way, as
    the output projection of `nn.MultiheadAttention` is used.
    """
    tied = modules_with_tied_weights(model)
    places: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[module] = places.get(module, 0) + 1
    layers: dict[str, LayerKind] = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if name and kind is not None and module not in tied and places[module] == 1:
            layers[name] = kind
    return layers


def _kind(module: nn.Module) -> LayerKind | None:
    # A weight that is computed (weight normalisation) is no parameter.
    if module._parameters.get("weight") is None:
        return None
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is nn.Embedding and module.max_norm is None:
        return "embedding"
    if type(module) in CONVOLUTIONS and cast(nn.Conv2d, module).groups == 1:
        return "conv"
    return None


def input_covariances(
    model: nn.Module,
    layers: Iterable[str],
    batches: Iterable[tuple[Any, Any]],
    call: Callable[[nn.Module, Any], Any] = call_model,
) -> dict[str, Tensor]:
    """Second moments X'X/n of the inputs of linear layers and embeddings.

    Args:
        model: The model; it is run in evaluation mode and left as it was.
        layers: Names of layers; convolutions are passed over.
        batches: Pairs (inputs, targets), as `Task.calibration_batches` gives them.
        call: How the model is called on inputs.

    Returns:
        Linear layer -> float64 tensor of shape `(in_features, in_features)`; embedding -> the
        diagonal alone, the share of each token, shape `(num_embeddings,)`. Positions that an
        `attention_mask` hides count for nothing. Layers that are not called are absent.
    """
    modules = {
        name: module for name in layers if isinstance(module := model.get_submodule(name), (nn.Linear, nn.Embedding))
    }
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: Tensor | None = None

    def observe(name: str, module: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            rows = arguments[0].detach()
            shape = rows.shape if isinstance(module, nn.Embedding) else rows.shape[:-1]
            if mask is not None and shape == mask.shape:
                rows = rows[mask]
            if isinstance(module, nn.Embedding):
                rows = rows.flatten()
                moments = torch.bincount(rows, minlength=module.num_embeddings).double()
            else:
                rows = rows.reshape(-1, rows.shape[-1])
                moments = (rows.T @ rows).double()
            sums[name] = sums.get(name, 0) + moments
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    handles = [module.register_forward_pre_hook(observe(name, module)) for name, module in modules.items()]
    training, device = model.training, device_of(model)
    model.eval()
    try:
        with torch.no_grad():
            for batch, _ in batches:
                inputs = map_tensors(batch, lambda tensor: tensor.to(device))
                given = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
                mask = given.bool() if given is not None else None
                call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {name: sums[name] / max(1, counts[name]) for name in sums}


def factorise(
    model: nn.Module, ranks: Mapping[str, int], covariances: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[str, ...]]:
    """Replaces layers by low-rank ones, in place.

    Args:
        model: The model.
        ranks: Layer name -> rank, from 1 to `max_rank`; for a convolution see `ranks_of_conv`.
        covariances: Second moments of layers' inputs (`input_covariances`); layers without any get
            the plain SVD.

    Returns:
        Name of each layer -> names of those that take its place, in the order in which they are applied.

    Raises:
        ConfigError: For a layer that is not one of `factorisable_layers`, or a rank out of range.
    """
    allowed = factorisable_layers(model)
    for name, rank in ranks.items():
        if name not in allowed:
            raise ConfigError.unknown("low_rank: layer", name, allowed)
        full = max_rank(cast(Tensor, model.get_submodule(name).weight).shape, allowed[name])
        if not 1 <= rank <= full:
            raise ConfigError(f"low_rank.{name}: rank {rank!r} was given, a whole number from 1 to {full} is allowed")
    made = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        weights = _factor_weights(layer, allowed[name], rank, (covariances or {}).get(name))
        factors = Factorised(layer, _layers(layer, weights))
        replace_module(model, name, factors)
        made[name] = tuple(f"{name}.{index}" for index in range(len(factors)))
    return made


def spectra(
    model: nn.Module, layers: Iterable[str], covariances: Mapping[str, Tensor] | None = None
) -> dict[str, np.ndarray]:
    """Singular values of layers, from which `rank_for_energy` chooses ranks.

    Args:
        model: The model; it stays as it is.
        layers: Names of `factorisable_layers`.
        covariances: As for `factorise`.

    Returns:
        Layer name -> descending values of shape `(max_rank,)`. Those of a convolution are root sums
        of squares over both sides, so that what is cut off bounds the error of its Tucker form.
    """
    values = {}
    for name in layers:
        weight = cast(Tensor, model.get_submodule(name).weight).detach().double()
        if math.prod(weight.shape[2:]) > 1:
            sides = [energies(unfold(weight, side)) for side in (0, 1)]
            squares = torch.zeros(max(map(len, sides))).to(weight)
            for side in sides:
                squares[: len(side)] += side
        else:
            moments = (covariances or {}).get(name)
            squares = energies(weight.flatten(1) if moments is None else _weighed(weight, moments.to(weight)))
        values[name] = squares.sqrt().cpu().numpy()
    return values


def _weighed(weight: Tensor, moments: Tensor) -> Tensor:
    """The weight in the measure in which its error counts."""
    if moments.dim() == 1:
        return weigh_tokens(weight, moments)
    root = root_of(moments)
    return weight.flatten(1) if root is None else weight.flatten(1) @ root


def rank_for_energy(singular_values: np.ndarray, energy: float) -> int:
    """The smallest rank that keeps a share of the squared singular values.

    Args:
        singular_values: Descending, shape `(max_rank,)`.
        energy: The share, in (0, 1].

    Raises:
        ConfigError: If the share is not in (0, 1].
    """
    if not 0 < energy <= 1:
        raise ConfigError(f"energy: {energy!r} was given, a number in (0, 1] is allowed")
    kept = np.cumsum(np.square(singular_values, dtype=np.float64))
    # Sums that differ by rounding alone are the same energy.
    return min(len(kept), int(np.searchsorted(kept, energy * kept[-1] * (1 - 1e-12))) + 1)


def _factor_weights(layer: nn.Module, kind: LayerKind, rank: int, covariance: Tensor | None) -> list[Tensor]:
    """Weights of the factors in float64, in the order and shapes of `factor_shapes`."""
    weight = cast(Tensor, layer.weight).detach().double()
    out_channels, in_channels, *kernel = weight.shape
    ones = (1,) * len(kernel)
    if math.prod(kernel) > 1:
        rank_in, rank_out = ranks_of_conv(rank, in_channels, out_channels)
        inner, core, outer = tucker(weight, rank_in, rank_out)
        first = [inner.T.reshape(*inner.T.shape, *ones)] if rank_in < in_channels else []
        last = [outer.reshape(*outer.shape, *ones)] if rank_out < out_channels else []
        return [*first, core, *last]
    moments = covariance.to(weight) if covariance is not None else None
    if kind == "embedding":
        left, right = split_embedding(weight, rank, moments)
        return [left, right.T]
    left, right = split_matrix(weight.flatten(1), rank, root_of(moments) if moments is not None else None)
    return [right.reshape(*right.shape, *ones), left.reshape(*left.shape, *ones)]


def _layers(layer: nn.Module, weights: list[Tensor]) -> list[nn.Module]:
    """Layers with the given weights, like the original in dtype, device and what it leaves untrained."""
    original = cast(nn.Parameter, layer.weight)
    bias = cast("nn.Parameter | None", getattr(layer, "bias", None))
    core = next((i for i, weight in enumerate(weights) if math.prod(weight.shape[2:]) > 1), 0)
    layers: list[nn.Module] = []
    for index, weight in enumerate(weights):
        made: Any
        # On no device nothing is drawn from torch's global generator.
        with torch.device("meta"):
            if isinstance(layer, CONVOLUTIONS):
                geometry = ("stride", "padding", "dilation", "padding_mode") if index == core else ()
                options: dict[str, Any] = {name: getattr(layer, name) for name in geometry}
                convolution: Any = type(layer)
                made = convolution(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, **options)
            elif isinstance(layer, nn.Embedding) and index == 0:
                made = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=layer.padding_idx)
            else:
                made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = nn.Parameter(
            weight.to(original).clone(memory_format=torch.contiguous_format), requires_grad=original.requires_grad
        )
        layers.append(made)
    if bias is not None:
        layers[-1].bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layers
