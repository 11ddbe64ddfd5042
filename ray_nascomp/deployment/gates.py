"""Sigmoids behind convolutions in integers: those of SiLU and HardSwish (x times its sigmoid), and gates of channels.

ONNX Runtime looks a sigmoid of 8 bits up in a table and multiplies integers; in floating point both would cost more
than the convolution saves. A hard sigmoid is linear between -3 and 3: the same integers, clipped, by another scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from scipy.special import expit

from ray_nascomp.deployment.layer_nodes import LayerNode
from ray_nascomp.nni_adapter.output_forms import HARD_SLOPE
from ray_nascomp.nni_adapter.scales import ActivationScale

SIGMOID_SCALE = ActivationScale(1 / 255, 0)
"""Of a sigmoid's outputs, 0..1."""

_OPERATORS = ("Sigmoid", "HardSigmoid", "HardSwish")
_LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Gate:
    """A sigmoid of a convolution's output.

    Attributes:
        layer: Position of the convolution's node.
        index: Position of the sigmoid's.
        operator: "Sigmoid", "HardSigmoid" or "HardSwish", which is a hard sigmoid and its product in one node.
        product: Position of the multiplication by its own input, where no layer reads the product: it has no
            scale from a layer then.
    """

    layer: int
    index: int
    operator: str
    product: int | None

    @property
    def is_hard(self) -> bool:
        """Whether it is linear between two limits."""
        return self.operator != "Sigmoid"


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
            if not _is_gate(sigmoid):
                continue
            pair = sorted((tensor, sigmoid.output[0]))
            products = [i for i in readers.get(sigmoid.output[0], []) if sorted(graph.node[i].input) == pair]
            products = [i for i in products if graph.node[i].op_type == "Mul"]
            if sigmoid.op_type == "HardSwish":
                products = [index]
            unread = [i for i in products if graph.node[i].output[0] not in for_layers]
            found.append(Gate(entry.index, index, sigmoid.op_type, unread[0] if unread else None))
    return found


def _is_gate(node: onnx.NodeProto) -> bool:
    if node.op_type != "HardSigmoid":
        return node.op_type in _OPERATORS
    parameters = {"alpha": 0.2, "beta": 0.5} | {attribute.name: attribute.f for attribute in node.attribute}
    return bool(np.isclose(parameters["alpha"], 1 / HARD_SLOPE) and np.isclose(parameters["beta"], 0.5))


def product_scale(scale: ActivationScale, is_hard: bool) -> ActivationScale:
    """The scale that just holds x times its sigmoid.

    Args:
        scale: Of x: it has 256 values.
        is_hard: Whether the sigmoid is a hard one.
    """
    values = (np.arange(256) - scale.zero_point) * scale.scale
    sigmoids = np.clip(values / HARD_SLOPE + 0.5, 0, 1) if is_hard else expit(values)
    products = values * sigmoids
    lower, upper = min(products.min(), 0.0), products.max()
    step = (upper - lower) / 255
    return ActivationScale(float(step), round(-lower / step))
