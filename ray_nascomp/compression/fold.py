"""Batch normalisation merged into the convolution or linear layer before it, as runtimes do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from ray_nascomp.compression.stand_ins import replace_module
from ray_nascomp.tasks.calling import call

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def foldable_pairs(model: nn.Module, example_inputs: Any) -> list[tuple[str, str]]:
    """Names of (convolution or linear layer, batch normalisation) where one feeds the other, at every call.

    Args:
        model: The model; it is run once in evaluation mode.
        example_inputs: Inputs to run it on.
    """
    produced: dict[int, tuple[str, Any]] = {}
    calls: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):

            def remember(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                calls[name] += 1
                produced[id(output)] = (name, output)

            handles.append(module.register_forward_hook(remember))
        elif isinstance(module, _NORMS) and module.track_running_stats:

            def match(_module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                calls[name] += 1
                owner = produced.get(id(inputs[0]))
                if owner is not None:
                    pairs[owner[0], name] += 1

            handles.append(module.register_forward_pre_hook(match))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return [(layer, norm) for (layer, norm), count in pairs.items() if count == calls[layer] == calls[norm]]


def fold_batch_norm(model: nn.Module, example_inputs: Any) -> None:
    """Merges every batch normalisation that can be, in place; the model keeps its outputs in evaluation mode."""
    for producer, norm in foldable_pairs(model, example_inputs):
        layer, normalisation = model.get_submodule(producer), model.get_submodule(norm)
        training = layer.training
        layer.eval()
        normalisation.eval()
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        if is_parametrized(layer, "weight"):
            remove_parametrizations(layer, "weight")  # The fused weight is a plain one.
        replace_module(model, producer, fuse(layer, normalisation).train(training))
        replace_module(model, norm, nn.Identity())
