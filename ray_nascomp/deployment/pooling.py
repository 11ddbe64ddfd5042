"""Means over whole images as one operator, which has an integer form in ONNX Runtime."""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper

from ray_nascomp.deployment.editor import GraphEditor

_IMAGE_AXES = {2, 3}
_RANK = 4


def use_global_pooling(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a GlobalAveragePool wherever a ReduceMean takes the mean of each channel of images.

    Args:
        proto: An exported model; changed in place.
    """
    graph = proto.graph
    if not any(node.op_type == "ReduceMean" for node in graph.node):
        return proto
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*inferred.value_info, *inferred.input)}
    constants = {initializer.name: initializer for initializer in graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += _pooled(node) if _is_image_mean(node, ranks, constants) else [node]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    GraphEditor(graph).finish()
    return proto


def _is_image_mean(node: onnx.NodeProto, ranks: dict[str, int], constants: dict[str, onnx.TensorProto]) -> bool:
    if node.op_type != "ReduceMean" or ranks.get(node.input[0]) != _RANK or len(node.input) < 2:
        return False
    if node.input[1] not in constants:
        return False
    axes = numpy_helper.to_array(constants[node.input[1]])
    return {int(axis) % _RANK for axis in axes} == _IMAGE_AXES


def _pooled(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    keeps = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
    source, output = node.input[0], node.output[0]
    if keeps:
        return [helper.make_node("GlobalAveragePool", [source], [output], name=node.name)]
    image = f"{output}_image"
    return [
        helper.make_node("GlobalAveragePool", [source], [image], name=node.name),
        helper.make_node("Squeeze", [image, node.input[1]], [output], name=f"{node.name}_squeezed"),
    ]
