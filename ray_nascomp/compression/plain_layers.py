"""Layers of which compression knows nothing, as plain ones that compute the same."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ray_nascomp.compression.attention import replace_conv1d
from ray_nascomp.compression.multihead import split_attentions


def use_plain_layers(model: nn.Module) -> None:
    """Replaces GPT-2's `Conv1D` and torch's `nn.MultiheadAttention` by linear layers, in place."""
    replace_conv1d(model)
    split_attentions(model)


def with_plain_weights(model: nn.Module) -> nn.Module:
    """The model without parametrizations (Wav2Vec2's weight norm), which cannot travel to workers or be quantized.

    So it is with torch's deprecated `weight_norm` and `spectral_norm`, whose weights cannot be copied.

    Args:
        model: Any module; it keeps its parametrizations and norms.

    Returns:
        The model itself where it has none; otherwise a copy that computes the same in evaluation mode.
    """
    normed = [(module, hook) for module in model.modules() for hook in _weight_norms(module)]
    if not normed and not any(map(is_parametrized, model.modules())):
        return model
    for module, hook in normed:
        # Each call makes the weight anew; torch copies no tensor that has a history.
        setattr(module, hook.name, getattr(module, hook.name).detach())
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for hook in _weight_norms(module):
            remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
            remove(module, hook.name)
        if is_parametrized(module):
            # A copy shares its class with the original, and removal changes the class.
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                remove_parametrizations(module, name)
    return model


def _weight_norms(module: nn.Module) -> list[WeightNorm | SpectralNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]
