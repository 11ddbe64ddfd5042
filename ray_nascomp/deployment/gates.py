"""Sigmoids behind convolutions in integers: those of SiLU (x times its sigmoid) and those that gate channels.

ONNX Runtime looks a sigmoid of 8 bits up in a table and multiplies integers; in floating point both would cost more
than the convolution saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from scipy.special import expit

from ray_nascomp.deployment.layer_nodes import LayerNode
from ray_nascomp.nni_adapter.quantization import ActivationScale

SIGMOID_SCALE = ActivationScale(1 / 255, 0)
"""Of a sigmoid's outputs, 0..1."""

_LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Gate:
    """A sigmoid of a convolution's output.

    Attributes:
        layer: Position of the convolution's node.
        sigmoid: Position of the sigmoid's.
        product: Position of the multiplication by its own input, where no layer reads the product: it has no
            scale from a layer then.
    """

    layer: int
    sigmoid: int
    product: int | None


def find_gates(graph: onnx.GraphProto, layers: Sequence[LayerNode]) -> list[Gate]:
    """The sigmoids that convolutions' outputs go through at once.

    Args:
        graph: The exported model in floating point.
        layers: Layers of it.
    """
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    for_layers = {node.input[0] for node in graph.node if node.op_type in _LAYERS}
    found = []
    for entry in layers:
        if entry.node.op_type != "Conv":
            continue
        tensor = entry.node.output[0]
        for index in readers.get(tensor, []):
            sigmoid = graph.node[index]
            if sigmoid.op_type != "Sigmoid":
                continue
            pair = sorted((tensor, sigmoid.output[0]))
            products = [i for i in readers.get(sigmoid.output[0], []) if sorted(graph.node[i].input) == pair]
            unread = [
                i for i in products if graph.node[i].op_type == "Mul" and graph.node[i].output[0] not in for_layers
            ]
            found.append(Gate(entry.index, index, unread[0] if unread else None))
    return found


def silu_scale(scale: ActivationScale) -> ActivationScale:
    """The scale that just holds x times the sigmoid of x.

    Args:
        scale: Of x: it has 256 values.
    """
    values = (np.arange(256) - scale.zero_point) * scale.scale
    products = values * expit(values)
    lower, upper = min(products.min(), 0.0), products.max()
    step = (upper - lower) / 255
    return ActivationScale(float(step), round(-lower / step))
