"""Plain layers that stand in, while a model is traced, for those that torch-pruning cannot follow.

Recurrent layers have an opaque autograd graph; grouped queries and rotated positions hang the
tracing, and a layer that makes both queries and keys breaks it. What is removed from the inputs
of a stand-in is removed from the layer itself afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ray_nascomp.compression.attention import Attention, attentions_left_whole, find_attentions, keep_inputs


@contextmanager
def standing_in(model: nn.Module) -> Iterator[dict[nn.Module, str]]:
    """The model with stand-ins, for as long as the context lasts.

    Yields:
        Linear layer of a stand-in -> name of the layer that it stands for.
    """
    originals: dict[str, nn.Module] = {}
    replaced: dict[nn.Module, str] = {}
    attentions = find_attentions(model)
    detached = [
        name
        for attention in attentions
        for member in attention.members
        if _cannot_be_followed(member, model.get_submodule(member.name))
        for name in {member.query, member.key, member.value}
    ]
    for path, module in attentions_left_whole(model, attentions).items():
        if _rotates(module):
            detached += [f"{path}.{name}" for name, child in module.named_children() if isinstance(child, nn.Linear)]
    for name in detached:
        originals[name] = model.get_submodule(name)
        replace_module(model, name, _Detached(originals[name]))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.RNNBase) and name:
            originals[name] = module
            stand_in = _RecurrentStandIn(module)
            replaced[stand_in.mix] = name
            replace_module(model, name, stand_in)
    try:
        yield replaced
    finally:
        for name, module in originals.items():
            replace_module(model, name, module)


def _cannot_be_followed(attention: Attention, module: nn.Module) -> bool:
    """Whether queries are grouped, come out of a layer with the keys, or are rotated by their positions."""
    return _rotates(module) or attention.kv_heads != attention.heads or attention.query == attention.key


def _rotates(module: nn.Module) -> bool:
    """Whether an attention rotates queries and keys by their positions."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and any("rotary" in name for name in code.co_names)


def remove_inputs(layer: Any, indices: Iterable[int]) -> None:
    """Removes input channels of a linear or recurrent layer, in place."""
    gone = set(indices)
    if isinstance(layer, nn.Linear):
        keep_inputs(layer, [i for i in range(layer.in_features) if i not in gone])
        return
    kept = torch.tensor([i for i in range(layer.input_size) if i not in gone])
    for name, parameter in list(layer.named_parameters()):
        if name.startswith("weight_ih_l0"):
            sliced = nn.Parameter(parameter.detach()[:, kept].clone(), requires_grad=parameter.requires_grad)
            setattr(layer, name, sliced)
    layer.input_size = len(kept)
    layer._init_flat_weights()


class _Detached(nn.Module):
    """A projection whose output is not followed: its channels belong to heads, which are sliced directly."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Any:
        """The projection's weight."""
        return self.layer.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The projection, cut off from the graph of gradients."""
        return self.layer(inputs).detach()


class _RecurrentStandIn(nn.Module):
    """A matrix product in place of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.directions = 2 if layer.bidirectional else 1
        self.layers = layer.num_layers
        self.hidden = layer.proj_size or layer.hidden_size
        self.batch_first = layer.batch_first
        self.has_cell = isinstance(layer, nn.LSTM)
        self.mix = nn.Linear(layer.input_size, self.hidden * self.directions, bias=False)

    def forward(self, inputs: torch.Tensor, _state: Any = None) -> tuple[torch.Tensor, Any]:
        """Outputs and last state, shaped as the recurrent layer's."""
        outputs = self.mix(inputs)
        last = outputs.mean(1 if self.batch_first else 0)[:, : self.hidden]
        state = last.expand(self.layers * self.directions, *last.shape)
        return outputs, (state, state) if self.has_cell else state


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
