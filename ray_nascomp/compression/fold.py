"""Batch normalisation merged into the convolution or linear layer before it, as runtimes do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ray_nascomp.compression.made_weights import convolutions_making_weights
from ray_nascomp.compression.patches import CONVOLUTIONS
from ray_nascomp.compression.stand_ins import replace_module
from ray_nascomp.tasks.calling import call

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def foldable_pairs(model: nn.Module, example_inputs: Any) -> list[tuple[str, str]]:
    """Names of (convolution or linear layer, batch normalisation) where one feeds the other alone, at every call.

    A layer whose output goes elsewhere too (the shortcut of a pre-activation residual network, the
    concatenation of a dense block), or is changed in place before, is not among them; nor is a convolution that
    makes what it multiplies by of its weight, or a norm of a library's own class, unless what it does beyond
    normalising are its children, such as an activation.

    Args:
        model: The model; it is run once in evaluation mode.
        example_inputs: Inputs to run it on.
    """
    produced: dict[int, tuple[str, Any]] = {}
    readers = _Readers()
    calls: Counter[str] = Counter()
    matches: list[tuple[str, str, int]] = []
    shapes: dict[str, torch.Size] = {}
    handles = []
    making_weights = convolutions_making_weights(model, example_inputs)
    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and name not in making_weights:

            def remember(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                calls[name] += 1
                produced[id(output)] = (name, output)
                readers.counts[id(output)] = 0

            handles.append(module.register_forward_hook(remember))
        elif isinstance(module, _NORMS) and module.track_running_stats:

            def match(_module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                calls[name] += 1
                owner = produced.get(id(inputs[0]))
                if owner is not None:
                    matches.append((owner[0], name, id(inputs[0])))
                    shapes[name] = inputs[0].shape

            handles.append(module.register_forward_pre_hook(match))
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), readers:
            call(model, example_inputs)
        known = {norm for norm, shape in shapes.items() if _is_followed_by_children(model.get_submodule(norm), shape)}
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    pairs = Counter((layer, norm) for layer, norm, tensor in matches if readers.counts[tensor] == 1 and norm in known)
    return [(layer, norm) for (layer, norm), count in pairs.items() if count == calls[layer] == calls[norm]]


def _is_followed_by_children(norm: Any, shape: torch.Size) -> bool:
    """Whether a norm in evaluation mode normalises, passes the result through its children, and does no more."""
    if type(norm) in _NORMS:
        return True
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator).to(norm.running_mean)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    with torch.no_grad():
        normalised = nn.functional.batch_norm(inputs, *statistics, eps=norm.eps)
        return torch.allclose(norm.forward(inputs), nn.Sequential(*norm.children())(normalised), rtol=1e-4, atol=1e-5)


class _Readers(TorchDispatchMode):
    """How many operators read each tensor, by its id, which a new tensor may have from one that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.counts.update({id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)})
        return function(*args, **kwargs)


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
        children = list(normalisation.children())
        replace_module(model, norm, nn.Sequential(*children).train(training) if children else nn.Identity())
