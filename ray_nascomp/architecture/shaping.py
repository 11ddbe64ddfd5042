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


class Resize:
    """What scales square images before a model sees them, as a hook of the model.

    Args:
        size: Height and width, in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, _model: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The model's inputs with the images scaled, bilinearly."""
        return tuple(map(self._scaled, inputs)), {name: self._scaled(value) for name, value in keywords.items()}

    @staticmethod
    def takes(value: Any) -> bool:
        """Whether something is a batch of square images: `(batch, channels, size, size)`."""
        return (
            isinstance(value, torch.Tensor)
            and value.dim() == 4
            and value.is_floating_point()
            and value.shape[-1] == value.shape[-2]
        )

    def _scaled(self, value: Any) -> Any:
        if not self.takes(value):
            return value
        return nn.functional.interpolate(value, size=(self.size, self.size), mode="bilinear", align_corners=False)


def resize_images(model: nn.Module, size: int) -> None:
    """Has a model scale its images to a size first, in place."""
    model.register_forward_pre_hook(Resize(size), with_kwargs=True)


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
            number; "parameters": name -> shape; "image_sizes", if they are there: what
            images are scaled to, one after the other.
    """
    for size in table.get("image_sizes", ()):
        resize_images(model, size)
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
