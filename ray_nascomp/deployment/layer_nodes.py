"""Which nodes of an exported graph are which layers of the network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

_LAYER_OPS = ("Conv", "Gemm", "MatMul", "Gather")
_Content = tuple[tuple[int, ...], bytes]


@dataclass(frozen=True)
class LayerNode:
    """The graph's node of a torch layer.

    Attributes:
        index: Position of the node in the graph.
        node: The node.
        layer: The layer's name.
        weight: Name of the weight's tensor: an initializer, or one transposed.
        transposed: Whether that tensor is the transposed torch weight.
    """

    index: int
    node: onnx.NodeProto
    layer: str
    weight: str
    transposed: bool


def layer_nodes(graph: onnx.GraphProto, weights: Mapping[str, np.ndarray]) -> Iterator[LayerNode]:
    """The nodes that multiply by one of the weights, or look its rows up.

    They are found by the weight's name or, where an exporter has renamed, transposed or merged it, by
    its content. Layers with equal weights are taken in the order of `weights`; where more nodes read
    a weight than there are layers with it, the first of these is found again.

    Args:
        graph: The graph.
        weights: Layer name -> torch weight.
    """
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    turned = {
        node.output[0]: initializers[node.input[0]]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in initializers and len(initializers[node.input[0]].dims) == 2
    }
    by_name = {f"model.{layer}.weight": layer for layer in weights}
    by_content: dict[_Content, list[tuple[str, bool]]] = {}
    for layer, weight in weights.items():
        by_content.setdefault(_content_of(weight), []).append((layer, False))
    for layer, weight in weights.items():
        if weight.ndim == 2:
            by_content.setdefault(_content_of(weight.T), []).append((layer, True))
    claimed: set[str] = set()
    shapes = {shape for shape, _digest in by_content}
    for index, node in enumerate(graph.node):
        if node.op_type not in _LAYER_OPS:
            continue
        for name in node.input[:1] if node.op_type == "Gather" else node.input:
            initializer = initializers.get(name) or turned.get(name)
            if initializer is None or initializer.data_type != onnx.TensorProto.FLOAT:
                continue
            if name in by_name and by_name[name] not in claimed:
                claimed.add(by_name[name])
                yield LayerNode(index, node, by_name[name], name, False)
                break
            shape = tuple(initializer.dims)
            if (shape[::-1] if name in turned else shape) not in shapes:
                continue
            values = numpy_helper.to_array(initializer)
            if matches := by_content.get(_content_of(values.T if name in turned else values)):
                layer, transposed = next((match for match in matches if match[0] not in claimed), matches[0])
                claimed.add(layer)
                yield LayerNode(index, node, layer, name, transposed)
                break


def _content_of(array: np.ndarray) -> _Content:
    without_minus_zero = np.ascontiguousarray(array, np.float32) + np.float32(0)
    return array.shape, hashlib.blake2b(without_minus_zero.data).digest()
