"""Gives a model's layers shapes of their own, as a table tells; needs nothing but torch.

This file is copied beside a saved model whose layers a config cannot describe, so that the
model loads without the package that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Factors(nn.Sequential):
    """Layers that stand for one: its factors, or what follows a table of fewer columns."""

    @property
    def weight(self) -> Any:
        """A weight of the type that the layer computes in."""
        return self[0].weight


def make_layer(table: Mapping[str, Any]) -> nn.Module:
    """The layer that a table describes: a torch class with its arguments, or a sequence of such."""
    if "layers" in table:
        return Factors(*(make_layer(layer) for layer in table["layers"]))
    layer: nn.Module = getattr(nn, table["class"])(**table["arguments"])
    return layer


def shape_layers(model: nn.Module, table: Mapping[str, Any]) -> None:
    """Changes a model's layers in place; what they compute needs new weights.

    Args:
        model: A model as its class makes it.
        table: "layers": name -> layer that takes its place; "attributes": module -> name ->
            number; "parameters": name -> shape.
    """
    for name, layer in table["layers"].items():
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, make_layer(layer))
    for name, attributes in table["attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            setattr(module, attribute, tuple(value) if isinstance(value, list) else value)
    for name, shape in table["parameters"].items():
        owner, _, child = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, child)
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        if isinstance(old, nn.Parameter):
            setattr(module, child, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            setattr(module, child, new)
