"""Simulated integers made real: quantize and dequantize nodes in an ONNX graph.

A layer's weight becomes an int8 tensor behind a DequantizeLinear, its input passes a
QuantizeLinear and a DequantizeLinear; ONNX Runtime fuses these with the layer into integer
kernels. Convolutions are fused only where their output is quantized too, be it by the next
layer's input: `unfollowed_convolutions` names those for which it is not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ray_nascomp.nni_adapter.quantization import ActivationScale, Calibration

_LAYER_OPS = ("Conv", "Gemm", "MatMul")
# Through these ONNX Runtime moves a quantization upwards.
_TRANSPARENT_OPS = ("Relu", "Clip", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class _LayerNode:
    """The graph's node of a torch layer.

    Attributes:
        index: Position of the node in the graph.
        node: The node.
        layer: The layer's name.
        weight: Name of the weight's initializer.
        transposed: Whether the initializer is the transposed torch weight.
    """

    index: int
    node: onnx.NodeProto
    layer: str
    weight: str
    transposed: bool


def unfollowed_convolutions(
    proto: onnx.ModelProto, weights: Mapping[str, np.ndarray], quantized: Collection[str]
) -> set[str]:
    """Quantized convolutions whose output no quantized layer takes as its input.

    Args:
        proto: The exported model in floating point.
        weights: Layer name -> torch weight, of all compressible layers.
        quantized: Names of the layers that will be quantized.
    """
    layers = list(_layer_nodes(proto.graph, {name: weights[name] for name in quantized}))
    quantized_nodes = {found.index for found in layers}
    consumers: dict[str, list[tuple[int, onnx.NodeProto]]] = {}
    for index, node in enumerate(proto.graph.node):
        for name in node.input:
            consumers.setdefault(name, []).append((index, node))
    graph_outputs = {output.name for output in proto.graph.output}

    def is_followed(tensor: str) -> bool:
        users = consumers.get(tensor, [])
        return (
            bool(users)
            and tensor not in graph_outputs
            and all(
                (index in quantized_nodes and user.input[0] == tensor)
                or (user.op_type in _TRANSPARENT_OPS and is_followed(user.output[0]))
                for index, user in users
            )
        )

    return {found.layer for found in layers if found.node.op_type == "Conv" and not is_followed(found.node.output[0])}


def insert_quantization(
    proto: onnx.ModelProto, weights: Mapping[str, np.ndarray], calibration: Calibration
) -> onnx.ModelProto:
    """The model with real integers in the calibrated layers.

    Args:
        proto: The exported model in floating point; not changed.
        weights: Layer name -> torch weight that the scales belong to.
        calibration: Layer name -> scales.

    Raises:
        ValueError: If a calibrated layer is not in the graph.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    editor = _GraphEditor(graph)
    found = list(_layer_nodes(graph, {name: weights[name] for name in calibration}))
    missing = set(calibration) - {entry.layer for entry in found}
    if missing:
        raise ValueError(f"layers {sorted(missing)} are not in the exported graph")
    for entry in found:
        scales = calibration[entry.layer]
        weight = weights[entry.layer]
        integers = scales.integers(weight)
        axis = weight.ndim - 1 if entry.transposed else 0
        position = list(entry.node.input).index(entry.weight)
        entry.node.input[position] = editor.add_weight(
            entry.layer, integers.T if entry.transposed else integers, scales.weight, axis, before=entry.index
        )
        if scales.input is not None:
            entry.node.input[0] = editor.add_activation(entry.node.input[0], scales.input, before=entry.index)
        if scales.output is not None:
            editor.quantize_output(entry.index, entry.node, scales.output)
    editor.finish()
    onnx.checker.check_model(result)
    return result


def _layer_nodes(graph: onnx.GraphProto, weights: Mapping[str, np.ndarray]) -> Iterator[_LayerNode]:
    """The nodes that multiply by one of the weights, found by name or, failing that, by content."""
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    by_name = {f"model.{layer}.weight": layer for layer in weights}
    by_content = {(weight.shape, weight.tobytes()): (layer, False) for layer, weight in weights.items()}
    for layer, weight in weights.items():
        if weight.ndim == 2:
            by_content.setdefault((weight.T.shape, np.ascontiguousarray(weight.T).tobytes()), (layer, True))
    for index, node in enumerate(graph.node):
        if node.op_type not in _LAYER_OPS:
            continue
        for name in node.input:
            if name not in initializers:
                continue
            if name in by_name:
                yield _LayerNode(index, node, by_name[name], name, False)
                break
            array = numpy_helper.to_array(initializers[name])
            if (match := by_content.get((array.shape, array.tobytes()))) is not None:
                yield _LayerNode(index, node, match[0], name, match[1])
                break


class _GraphEditor:
    """Adds nodes before and after others, each tensor quantized once, and drops what is left over."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._before: dict[int, list[onnx.NodeProto]] = {}
        self._after: dict[int, list[onnx.NodeProto]] = {}
        self._quantized: dict[tuple[str, float, int], str] = {}
        self._weights: set[str] = set()
        self._count = 0

    def add_weight(self, layer: str, integers: np.ndarray, scales: np.ndarray, axis: int, before: int) -> str:
        """Name of the dequantized weight."""
        prefix = f"{layer}.weight"
        if layer in self._weights:
            return f"{prefix}_d"
        self._weights.add(layer)
        self._constant(f"{prefix}_q", np.ascontiguousarray(integers))
        self._constant(f"{prefix}_s", scales)
        self._constant(f"{prefix}_z", np.zeros(len(scales), np.int8))
        node = helper.make_node(
            "DequantizeLinear", [f"{prefix}_q", f"{prefix}_s", f"{prefix}_z"], [f"{prefix}_d"], axis=axis
        )
        self._before.setdefault(before, []).append(node)
        return f"{prefix}_d"

    def add_activation(self, tensor: str, scale: ActivationScale, before: int) -> str:
        """Name of the tensor after it has been quantized and dequantized."""
        key = (tensor, scale.scale, scale.zero_point)
        if key not in self._quantized:
            name, nodes = self._pair(tensor, scale)
            self._before.setdefault(before, []).extend(nodes)
            self._quantized[key] = name
        return self._quantized[key]

    def quantize_output(self, index: int, node: onnx.NodeProto, scale: ActivationScale) -> None:
        """Lets everything that reads the node's output read it quantized and dequantized."""
        original = node.output[0]
        raw = f"{original}_raw"
        node.output[0] = raw
        _name, nodes = self._pair(raw, scale)
        nodes[-1].output[0] = original
        self._after.setdefault(index, []).extend(nodes)

    def finish(self) -> None:
        """Puts the new nodes in place; removes initializers and nodes that nothing reads."""
        nodes: list[onnx.NodeProto] = []
        for index, node in enumerate(self._graph.node):
            nodes += [*self._before.get(index, []), node, *self._after.get(index, [])]
        outputs = {output.name for output in self._graph.output}
        while True:
            read = {name for node in nodes for name in node.input} | outputs
            alive = [node for node in nodes if any(name in read for name in node.output)]
            if len(alive) == len(nodes):
                break
            nodes = alive
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        kept = [initializer for initializer in self._graph.initializer if initializer.name in read]
        copied = [onnx.TensorProto.FromString(initializer.SerializeToString()) for initializer in kept]
        del self._graph.node[:]
        del self._graph.initializer[:]
        del self._graph.value_info[:]
        self._graph.node.extend(copies)
        self._graph.initializer.extend(copied)

    def _pair(self, tensor: str, scale: ActivationScale) -> tuple[str, list[onnx.NodeProto]]:
        prefix = f"a{self._count}"
        self._count += 1
        self._constant(f"{prefix}_s", np.array(scale.scale, np.float32))
        self._constant(f"{prefix}_z", np.array(scale.zero_point, np.uint8))
        quantize = helper.make_node("QuantizeLinear", [tensor, f"{prefix}_s", f"{prefix}_z"], [f"{prefix}_q"])
        dequantize = helper.make_node(
            "DequantizeLinear", [f"{prefix}_q", f"{prefix}_s", f"{prefix}_z"], [f"{prefix}_d"]
        )
        return f"{prefix}_d", [quantize, dequantize]

    def _constant(self, name: str, array: np.ndarray) -> None:
        self._graph.initializer.append(numpy_helper.from_array(array, name))
