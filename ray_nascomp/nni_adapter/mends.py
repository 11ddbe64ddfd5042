"""What is broken in NNI 3.0, mended from outside."""

from __future__ import annotations

from typing import Any

from nni.compression.base.target_space import TargetSpace
from nni.compression.pruning.tools import sparse_gen

_original = sparse_gen._generate_dependency_sparsity
_ratio_mask = sparse_gen._ratio_mask


def mend_groups_of_mixed_layers() -> None:
    """Lets convolutions and linear layers share a group: NNI adds up their metrics, whose shapes differ.

    A metric has one value a channel, whatever the number of further dimensions of size one.
    """
    sparse_gen._generate_dependency_sparsity = _of_flat_metrics


def mend_order_in_memory() -> None:
    """Lets single weights of convolutions with channels last in memory be masked: NNI calls `view` on their metrics."""
    sparse_gen._ratio_mask = lambda metric, *settings, **named: _ratio_mask(metric.contiguous(), *settings, **named)


def mend_copied_settings() -> None:
    """Lets NNI read a setting without a copy of all: it reads some at every layer and step."""
    TargetSpace.setting = property(lambda space: space._setting)


def _of_flat_metrics(metrics: Any, target_spaces: Any) -> Any:
    flat = {layer: {name: metric.reshape(-1) for name, metric in found.items()} for layer, found in metrics.items()}
    masks = _original(flat, target_spaces)
    return {
        layer: {name: mask.reshape(metrics[layer][name].shape) for name, mask in found.items()}
        for layer, found in masks.items()
    }


def unwrap(compressor: Any) -> None:
    """Takes NNI's wrappers off, without the class's own `forward` that they leave in every module.

    A network that has been wrapped is then built like one that has not.
    """
    compressor.unwrap_model()
    for module in compressor.bound_model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
