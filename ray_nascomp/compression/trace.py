"""A model's structure, found by running it once and following its channels."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ray_nascomp.compression.attention import Attention, attentions_left_whole, find_attentions
from ray_nascomp.compression.constants import layers_of_constants
from ray_nascomp.compression.fold import foldable_pairs
from ray_nascomp.compression.graph import ChannelGraph, build_graph, modules_with_tied_weights, whole_graph
from ray_nascomp.compression.low_rank import factorisable_layers
from ray_nascomp.compression.made_weights import convolutions_making_weights
from ray_nascomp.compression.patches import CONVOLUTIONS
from ray_nascomp.compression.plain_layers import use_plain_layers
from ray_nascomp.errors import UntraceableModelError
from ray_nascomp.model_spec import GroupSpec, LayerKind, LayerSpec, ModelSpec
from ray_nascomp.tasks.calling import batch_size_of, call

_PRODUCT_OPS = ("bmm", "baddbmm", "_scaled_dot_product")


def trace_model(model: nn.Module, example_inputs: Any) -> ModelSpec:
    """The structure of a model; its weights are left as they are.

    Args:
        model: Any module that runs on the example.
        example_inputs: A tensor, a tuple or a dict, batch first.

    Raises:
        UntraceableModelError: If the model does not run on the example.

    Warns:
        UserWarning: If torch-pruning cannot follow its channels: none of them can be removed then. If
            there are attentions none of whose heads can be removed.
    """
    traced = copy.deepcopy(model).eval().requires_grad_(False)
    use_plain_layers(traced)
    run = _Run(traced, example_inputs)
    attentions = find_attentions(traced)
    whole = dict.fromkeys(type(module).__name__ for module in attentions_left_whole(traced, attentions).values())
    if whole:
        warnings.warn(
            f"heads of {', '.join(whole)} in {type(model).__name__} stay whole, all else can be compressed: how they "
            "share out channels is not known",
            stacklevel=2,
        )
    try:
        graph = build_graph(traced, example_inputs, attentions)
    except Exception as error:  # torch-pruning says anything to what it cannot follow.
        reason = error if isinstance(error, UntraceableModelError) else f"{type(error).__name__}: {error}"
        warnings.warn(
            f"channels of {type(model).__name__} stay whole, all else can be compressed: {reason}", stacklevel=2
        )
        graph = whole_graph(traced, example_inputs)
    heads = [_heads_group(attention, run) for attention in attentions if attention.units > 1]
    graph = _with_heads(graph, [a for a in attentions if a.units > 1], heads)
    biases = {member.position_bias for attention in attentions for member in attention.members}
    layers = tuple(_layers(traced, example_inputs, run, graph, biases))
    order = {name: index for index, (name, _) in enumerate(traced.named_modules())}
    groups = tuple(sorted(graph.groups, key=lambda group: order[group.layers[0]]))
    known_macs = sum(_dense_macs(layer) for layer in layers) + sum(g.width * g.macs_per_unit for g in groups)
    total_params = sum(parameter.numel() for parameter in traced.parameters())
    known_params = sum(_dense_params(layer) for layer in layers)
    unused_macs = sum(run.macs_of(name, traced.get_submodule(name)) for name in graph.unused)
    return ModelSpec(layers, groups, total_params - known_params, max(0, run.macs - known_macs - unused_macs))


class _Run:
    """What one run of the model shows: positions of each layer, multiply-accumulates."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._samples = batch_size_of(example_inputs)
        self._root = type(model).__name__
        self.positions: dict[str, int] = {}
        self.in_positions: dict[str, int] = {}
        handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in model.named_modules()
            if _is_layer(module)
        ]
        # oneDNN's fused recurrent kernels are counted as nothing, and so is the CPU's fused attention.
        has_recurrence = any(isinstance(module, nn.RNNBase) for module in model.modules())
        was_enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False if has_recurrence else None)
        fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self._counter = FlopCounterMode(display=False, custom_mapping={fused_attention: _attention_flops})
        try:
            with torch.no_grad(), self._counter:
                call(model, example_inputs)
        except Exception as error:
            raise UntraceableModelError(f"the model does not run on the example inputs: {error}") from error
        finally:
            torch.backends.mkldnn.set_flags(_enabled=was_enabled)
            for handle in handles:
                handle.remove()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self._counter.get_total_flops() // 2 // self._samples

    def macs_of(self, name: str, layer: Any) -> int:
        """Multiply-accumulates of one sample in a layer's own weight."""
        return layer.weight.numel() * self.positions.get(name, 0)

    def product_macs(self, name: str) -> int:
        """Multiply-accumulates of one sample in a module's products of activations."""
        counts: Mapping[Any, int] = self._counter.get_flop_counts().get(f"{self._root}.{name}", {})
        flops = sum(count for op, count in counts.items() if any(part in str(op) for part in _PRODUCT_OPS))
        return flops // 2 // self._samples

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(module, nn.RNNBase):
                count = inputs[0].numel() // inputs[0].shape[-1]
            else:
                weight = getattr(module, "weight", None)
                if weight is None or not hasattr(output, "numel"):
                    return
                channels = weight.shape[-1] if isinstance(module, nn.Embedding) else weight.shape[0]
                count = output.numel() // channels
                if isinstance(module, CONVOLUTIONS):
                    within = inputs[0].numel() // module.in_channels // self._samples
                    self.in_positions[name] = self.in_positions.get(name, 0) + within
            self.positions[name] = self.positions.get(name, 0) + count // self._samples

        return hook


def _is_layer(module: nn.Module) -> bool:
    """Whether it computes by itself; a derived convolution may hold what pads its inputs, a norm its activation."""
    derived = (*CONVOLUTIONS, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    return isinstance(module, derived) or next(module.children(), None) is None


def _attention_flops(query: Any, key: Any, value: Any, *_arguments: Any, **_keywords: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _heads_group(attention: Attention, run: _Run) -> GroupSpec:
    producers = tuple(attention.rows(range(attention.units)))
    macs = sum(run.product_macs(member.name) for member in attention.members)
    return GroupSpec(
        name=attention.name,
        width=attention.units,
        layers=producers,
        prunable=True,
        unit=len(attention.columns([0])[attention.output]),
        columns_of=attention.output,
        macs_per_unit=macs // attention.units,
    )


def _with_heads(graph: ChannelGraph, attentions: list[Attention], heads: list[GroupSpec]) -> ChannelGraph:
    """The graph with heads in place of the channels that queries, keys and values consist of."""
    inner = {layer for group in heads for layer in group.layers}
    dropped = {group.name for group in graph.groups if set(group.layers) <= inner}
    groups = [group for group in graph.groups if group.name not in dropped]
    out_groups = {name: pair for name, pair in graph.out_groups.items() if name not in inner}
    in_groups = {
        name: tuple(pair for pair in pairs if pair[0] not in dropped) for name, pairs in graph.in_groups.items()
    }
    for attention, group in zip(attentions, heads, strict=True):
        for layer, rows in attention.rows([0]).items():
            out_groups[layer] = (group.name, len(rows))
        for layer, columns in attention.columns([0]).items():
            in_groups[layer] = ((group.name, len(columns)),)
        for member in attention.members:
            if member.position_bias is not None:
                in_groups[member.position_bias] = ((group.name, 1),)
    return ChannelGraph((*groups, *heads), out_groups, in_groups, graph.unused)


def _layers(
    model: nn.Module, example_inputs: Any, run: _Run, graph: ChannelGraph, whole: Collection[str | None]
) -> list[LayerSpec]:
    """All layers with parameters; those of `whole` are not factorised."""
    tied = modules_with_tied_weights(model)
    factorisable = factorisable_layers(model).keys() - set(whole)
    folds = {norm: conv for conv, norm in foldable_pairs(model, example_inputs)}
    making_weights = convolutions_making_weights(model, example_inputs)
    constant = layers_of_constants(model, example_inputs)
    layers = []
    for name, module in model.named_modules():
        if not _is_layer(module) or next(module.parameters(recurse=False), None) is None:
            continue
        positions = 0 if module in tied or name in graph.unused else run.positions.get(name, 0)
        out_group, out_per_unit = graph.out_groups.get(name, (None, 1))
        layer = replace(
            _layer(name, module, positions),
            out_group=out_group,
            out_per_unit=out_per_unit,
            in_groups=graph.in_groups.get(name, ()),
            in_positions=run.in_positions.get(name, 0),
            folds_into=folds.get(name),
            factorisable=positions > 0 and name in factorisable and name not in constant,
            makes_weight=name in making_weights,
            is_constant=name in constant,
        )
        layers.append(layer)
    return layers


def _layer(name: str, module: nn.Module, positions: int) -> LayerSpec:
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None) is not None
    shape = tuple(weight.shape) if weight is not None else ()
    params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    kind: LayerKind = "other"
    if isinstance(module, (nn.LSTM, nn.GRU)):
        rows = sum(p.shape[0] for n, p in module.named_parameters() if n.startswith("weight_ih_l0"))
        shape = (rows, module.input_size)
        return LayerSpec(name, "recurrent", shape, False, positions, params - math.prod(shape))
    if isinstance(module, CONVOLUTIONS):
        depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
        kind = "depthwise_conv" if depthwise else "conv"
    elif isinstance(module, nn.Linear):
        kind = "linear"
    elif isinstance(module, nn.Embedding):
        kind = "embedding"
    elif weight is not None and weight.dim() == 1:
        kind = "batch_norm" if isinstance(module, nn.modules.batchnorm._BatchNorm) else "norm"
    if kind != "other":
        return LayerSpec(name, kind, shape, bias, positions)
    return LayerSpec(name, kind, (), False, positions, params)


def _dense_params(layer: LayerSpec) -> int:
    if not layer.weight_shape:
        return layer.fixed_params
    return math.prod(layer.weight_shape) + layer.fixed_params + (layer.weight_shape[0] if layer.bias else 0)


def _dense_macs(layer: LayerSpec) -> int:
    has_macs = layer.is_compressible or layer.kind == "recurrent"
    return math.prod(layer.weight_shape) * layer.positions if has_macs else 0
