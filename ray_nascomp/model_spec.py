"""What is known of a model without its weights: layers, coupled groups, shapes, operations.

Everything that reasons about a model without running it (spaces, costs, reports) reads a
`ModelSpec`. It is made once by tracing the model with torch-pruning's dependency graph
(Fang et al. 2023, DepGraph, arXiv 2301.12900).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ray_nascomp.errors import UntraceableModelError

if TYPE_CHECKING:
    from torch import nn

LayerKind = Literal["conv", "depthwise_conv", "linear", "embedding", "batch_norm", "norm", "other"]


@dataclass(frozen=True)
class LayerSpec:
    """One leaf module that holds parameters.

    Attributes:
        name: Dotted module name.
        kind: What the layer is.
        weight_shape: Shape of `weight` as torch has it; for "other" empty.
        bias: Whether there is a bias, one value an output channel.
        positions: Output positions of one sample: pixels or tokens, summed over calls; 0 for a layer that
            is never called or shares its weight, which then counts in `ModelSpec.extra_macs`.
        fixed_params: Parameters that no group changes ("other").
        out_group: Group whose width is the number of output channels, for layers that produce them.
        in_groups: Pairs (group, inputs for each of its channels) that make up the input channels; for
            normalisations and embeddings, the channels that they pass on.
        folds_into: For a batch normalisation, the convolution that it merges with on export.
    """

    name: str
    kind: LayerKind
    weight_shape: tuple[int, ...]
    bias: bool
    positions: int = 1
    fixed_params: int = 0
    out_group: str | None = None
    in_groups: tuple[tuple[str, int], ...] = ()
    folds_into: str | None = None

    @property
    def is_compressible(self) -> bool:
        """Whether the layer multiplies by a weight that can be quantized."""
        return self.kind in ("conv", "depthwise_conv", "linear") and self.positions > 0


@dataclass(frozen=True)
class GroupSpec:
    """Layers whose output channels are tied, pruned together.

    A group's units are what is removed from it: single channels, or whole attention heads (with
    grouped queries, a key-value head and all queries that share it).

    Attributes:
        name: Name of the first layer of the group; of an attention's heads, the attention module's.
        width: Number of units.
        layers: Names of the convolutions and linear layers that produce the channels.
        prunable: Whether units can be removed without changing the model's output shape.
        unit: Columns that a unit has in the weight of `columns_of`; 1 for channels.
        columns_of: For attention heads, the output projection: the layer whose input columns are
            compared to choose heads; None for channels, chosen by the rows of `layers`.
        macs_per_unit: Multiply-accumulates of one sample that a unit takes outside of layers
            (attention products).
    """

    name: str
    width: int
    layers: tuple[str, ...]
    prunable: bool
    unit: int = 1
    columns_of: str | None = None
    macs_per_unit: int = 0

    @property
    def is_heads(self) -> bool:
        """Whether the units are attention heads."""
        return self.columns_of is not None


@dataclass(frozen=True)
class ModelSpec:
    """The structure of a model, without weights.

    Attributes:
        layers: All layers with parameters, in the model's order.
        groups: All groups of coupled channels, in the model's order.
        extra_params: Parameters that belong to no leaf layer.
        extra_macs: Multiply-accumulates of one sample outside the layers (attention products,
            recurrent layers).
    """

    layers: tuple[LayerSpec, ...]
    groups: tuple[GroupSpec, ...]
    extra_params: int = 0
    extra_macs: int = 0

    @classmethod
    def from_model(cls, model: nn.Module, example_inputs: Any) -> ModelSpec:
        """Traces the model; its weights are left as they are.

        Args:
            model: Any module that runs on the example.
            example_inputs: A tensor, a tuple or a dict, batch first.

        Raises:
            UntraceableModelError: If the model cannot be run or traced.
        """
        return _trace(model, example_inputs)

    @property
    def prunable_groups(self) -> tuple[GroupSpec, ...]:
        """The groups that a sparsity can be given for."""
        return tuple(group for group in self.groups if group.prunable)

    @property
    def compressible_layers(self) -> tuple[LayerSpec, ...]:
        """The layers that bits can be given for."""
        return tuple(layer for layer in self.layers if layer.is_compressible)

    def group_of(self, layer: str) -> GroupSpec | None:
        """The group that a layer's output channels belong to."""
        return next((group for group in self.groups if layer in group.layers), None)

    def to_json(self) -> str:
        """The spec as JSON text, a few kilobytes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The spec of `to_json`."""
        data = json.loads(text)
        layers = tuple(
            LayerSpec(
                **{
                    **layer,
                    "weight_shape": tuple(layer["weight_shape"]),
                    "in_groups": tuple((group, count) for group, count in layer["in_groups"]),
                }
            )
            for layer in data["layers"]
        )
        groups = tuple(GroupSpec(**{**group, "layers": tuple(group["layers"])}) for group in data["groups"])
        return cls(layers, groups, data["extra_params"], data["extra_macs"])


def _trace(model: nn.Module, example_inputs: Any) -> ModelSpec:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ray_nascomp.compression.fold import foldable_pairs
    from ray_nascomp.compression.graph import build_graph, modules_with_tied_weights
    from ray_nascomp.tasks.calling import batch_size_of, call

    samples = batch_size_of(example_inputs)
    traced = copy.deepcopy(model).eval()
    positions: dict[str, int] = {}
    handles = [
        module.register_forward_hook(_position_counter(name, positions, samples))
        for name, module in traced.named_modules()
        if not list(module.children())
    ]
    counter = FlopCounterMode(display=False)
    # oneDNN's fused recurrent kernels are counted as nothing.
    has_recurrence = any(isinstance(module, torch.nn.RNNBase) for module in traced.modules())
    countable = torch.backends.mkldnn.flags(enabled=False) if has_recurrence else nullcontext()
    try:
        with torch.no_grad(), counter, countable:
            call(traced, example_inputs)
    except Exception as error:
        raise UntraceableModelError(f"the model does not run on the example inputs: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    try:
        groups, out_groups, in_groups = build_graph(traced, example_inputs)
    except UntraceableModelError:
        raise
    except Exception as error:
        raise UntraceableModelError(
            f"torch-pruning finds no groups in {type(model).__name__} ({type(error).__name__}: {error})"
        ) from error
    tied = modules_with_tied_weights(traced)
    folds = {norm: conv for conv, norm in foldable_pairs(traced, example_inputs)}
    layers = tuple(
        replace(
            _layer_spec(
                name,
                module,
                0 if module in tied else positions.get(name, 0),
                out_groups.get(name),
                in_groups.get(name, ()),
            ),
            folds_into=folds.get(name),
        )
        for name, module in traced.named_modules()
        if not list(module.children()) and next(module.parameters(recurse=False), None) is not None
    )
    total_macs = counter.get_total_flops() // 2 // samples
    known_macs = sum(_dense_macs(layer) for layer in layers)
    total_params = sum(parameter.numel() for parameter in traced.parameters())
    known_params = sum(_dense_params(layer) for layer in layers)
    return ModelSpec(layers, groups, total_params - known_params, max(0, total_macs - known_macs))


def _position_counter(name: str, positions: dict[str, int], samples: int) -> Any:
    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        weight = getattr(module, "weight", None)
        if weight is None or not hasattr(output, "numel"):
            return
        channels = weight.shape[-1] if type(module).__name__ == "Embedding" else weight.shape[0]
        positions[name] = positions.get(name, 0) + output.numel() // (channels * samples)

    return hook


def _layer_spec(
    name: str, module: nn.Module, positions: int, out_group: str | None, in_groups: tuple[tuple[str, int], ...]
) -> LayerSpec:
    from torch import nn

    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None) is not None
    shape = tuple(weight.shape) if weight is not None else ()
    kind: LayerKind = "other"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
        kind = "depthwise_conv" if depthwise else "conv"
    elif isinstance(module, nn.Linear):
        kind = "linear"
    elif isinstance(module, nn.Embedding):
        kind = "embedding"
    elif weight is not None and weight.dim() == 1:
        kind = "batch_norm" if isinstance(module, nn.modules.batchnorm._BatchNorm) else "norm"
    if kind != "other":
        return LayerSpec(name, kind, shape, bias, positions, 0, out_group, in_groups)
    params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return LayerSpec(name, kind, (), False, positions, params)


def _dense_params(layer: LayerSpec) -> int:
    if not layer.weight_shape:
        return layer.fixed_params
    channels = layer.weight_shape[0]
    return math.prod(layer.weight_shape) + (channels if layer.bias else 0)


def _dense_macs(layer: LayerSpec) -> int:
    return math.prod(layer.weight_shape) * layer.positions if layer.is_compressible else 0


def resize(layer: LayerSpec, removed: Mapping[str, int]) -> tuple[int, ...]:
    """The layer's weight shape after removing a number of channels from each group.

    Args:
        layer: The layer.
        removed: Group name -> number of removed channels; absent groups stay whole.
    """
    shape = list(layer.weight_shape)
    if not shape:
        return ()
    gone_out = removed.get(layer.out_group, 0) if layer.out_group else 0
    gone_in = sum(removed.get(group, 0) * count for group, count in layer.in_groups)
    if layer.kind == "embedding":
        shape[1] -= gone_in
        return tuple(shape)
    shape[0] -= gone_in if layer.kind in ("batch_norm", "norm") else gone_out
    if layer.kind in ("conv", "linear"):
        shape[1] -= gone_in
    return tuple(shape)
