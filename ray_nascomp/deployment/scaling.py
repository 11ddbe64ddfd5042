"""The factors of smoothed layers, left out of a network while it is exported and put into its graph afterwards.

Which layers are smoothed differs from plan to plan; what is exported does not, and can be used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from torch import nn

from ray_nascomp.compression.smooth import Smoothed
from ray_nascomp.compression.stand_ins import replace_module
from ray_nascomp.deployment.editor import GraphEditor
from ray_nascomp.deployment.layer_nodes import layer_nodes
from ray_nascomp.deployment.stored import NodeList


@dataclass(frozen=True)
class ScaledLayer:
    """A layer whose inputs are scaled.

    Attributes:
        weight: The layer's weight.
        factor: What each input feature is multiplied by, shape `(features,)`.
    """

    weight: np.ndarray
    factor: np.ndarray


@contextmanager
def without_scales(network: nn.Module) -> Iterator[dict[str, ScaledLayer]]:
    """Within it smoothed layers are plain ones again, whose inputs are not scaled; yields these by name."""
    smoothed = {name: module for name, module in network.named_modules() if name and isinstance(module, Smoothed)}
    layers = {}
    try:
        for name, module in smoothed.items():
            parts: list[Any] = list(module)
            factor, weight = (tensor.detach().numpy() for tensor in (parts[0].factor, module.weight))
            layers[name] = ScaledLayer(weight, factor)
            replace_module(network, name, parts[1])
        yield layers
    finally:
        for name, module in smoothed.items():
            replace_module(network, name, module)


def insert_scales(graph: onnx.GraphProto, layers: Mapping[str, ScaledLayer]) -> None:
    """Multiplies the inputs of layers by their factors; in place. Layers with one input and equal factors share this.

    Raises:
        ValueError: If a layer is not in the graph.
    """
    if not layers:
        return
    editor = GraphEditor(graph)
    shared: dict[tuple[str, bytes], str] = {}
    missing = set(layers)
    for found in layer_nodes(graph, {name: layer.weight for name, layer in layers.items()}):
        missing.discard(found.layer)
        factor = layers[found.layer].factor
        key = found.node.input[0], factor.tobytes()
        if key not in shared:
            added = NodeList(f"{found.layer}.scale", f"{found.layer}.scaled")
            shared[key] = added.node("Mul", [found.node.input[0], added.constant("factor", factor)])
            editor.before(found.index, added)
        found.node.input[0] = shared[key]
    if missing:
        raise ValueError(f"layers {sorted(missing)} are not in the exported graph")
    editor.finish()
