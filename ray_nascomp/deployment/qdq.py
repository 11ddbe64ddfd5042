"""Simulated integers made real in an ONNX graph.

Where a layer's input is quantized, its weight becomes an int8 tensor behind a DequantizeLinear
and its input passes a QuantizeLinear and a DequantizeLinear; ONNX Runtime fuses these with the
layer into integer kernels. Convolutions are fused only where their output is quantized too, be it
by the next layer's input (`outputs`). Linear
layers are fused as they are; those with a bias, where no integers follow, by an integer bias.
Where a layer's input stays in floating point, its weight is stored as integers and unfolded when
the file is loaded; of an embedding, when its rows are looked up. Large products by 4 bits are left
to an operator of ONNX Runtime's own (`blocks`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ray_nascomp.deployment.blocks import BLOCK_DOMAIN
from ray_nascomp.deployment.editor import GraphEditor
from ray_nascomp.deployment.gates import find_gates
from ray_nascomp.deployment.layer_nodes import LayerNode, layer_nodes
from ray_nascomp.deployment.outputs import followers_of, output_places
from ray_nascomp.deployment.readers import Readers
from ray_nascomp.deployment.stored import UNPACKING_OPSET, stored_bits
from ray_nascomp.deployment.writer import QuantizationWriter
from ray_nascomp.nni_adapter.scales import Calibration

_BIAS_LIMIT = 2**30
"""Largest multiple that a bias is of the scales' product."""


def insert_quantization(
    proto: onnx.ModelProto,
    weights: Mapping[str, np.ndarray],
    calibration: Calibration,
    exported: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """The model with real integers in the calibrated layers.

    Args:
        proto: The exported model in floating point; not changed.
        weights: Layer name -> torch weight that the scales belong to: of convolutions, linear
            layers and embeddings.
        calibration: Layer name -> scales.
        exported: The weights as the graph has them, where a quantizer has changed them since.

    Raises:
        ValueError: If a calibrated layer is not in the graph, or the graph's opset is too old to
            unfold packed weights.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    opset = next(entry.version for entry in result.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < UNPACKING_OPSET and any(stored_bits("linear", scales.bits) < 8 for scales in calibration.values()):
        raise ValueError(f"weights of fewer than 8 bits need opset {UNPACKING_OPSET}, the graph has {opset}")
    _reshape_instead_of_flattening(graph)
    known = exported or weights
    found = list(layer_nodes(graph, {name: known[name] for name in calibration}))
    missing = set(calibration) - {entry.layer for entry in found}
    if missing:
        raise ValueError(f"layers {sorted(missing)} are not in the exported graph")
    biases = _biases(graph, found)
    calibration = _with_room_for_biases(found, biases, calibration)
    gates = find_gates(graph, found)
    quantized = [entry for entry in found if calibration[entry.layer].input is not None]
    readers = Readers(graph, quantized, through_joins=True)
    writer = QuantizationWriter(
        GraphEditor(graph),
        readers,
        _owners(weights, calibration),
        {entry.layer for entry in found if entry.node.op_type == "Gather"},
        _clip_limits(graph),
    )
    followers = followers_of(quantized, readers)
    outputs = output_places(found, calibration, readers)
    for entry in found:
        if entry.node.op_type == "Gemm" and entry.index in biases and followers.get(entry.index, ()) is None:
            writer.write_bias(entry, biases[entry.index], calibration[entry.layer])
        writer.write(entry, weights[entry.layer], calibration[entry.layer])
        if entry.index in outputs:
            writer.write_output(*outputs[entry.index])
    names = {entry.index: entry.layer for entry in found}
    for gate in gates:
        scale = calibration[names[gate.layer]].output
        if scale is not None:
            writer.write_gate(gate, scale)
    writer.editor.finish()
    if any(node.domain == BLOCK_DOMAIN for node in graph.node):
        result.opset_import.append(helper.make_opsetid(BLOCK_DOMAIN, 1))
    onnx.checker.check_model(result)
    return result


def _reshape_instead_of_flattening(graph: onnx.GraphProto) -> None:
    """In place: through a Flatten ONNX Runtime moves no quantization, and the convolution before would not be fused."""
    flat = [node for node in graph.node if node.op_type == "Flatten" and all(a.i == 1 for a in node.attribute)]
    for node in flat:
        node.op_type = "Reshape"
        node.input.append("flat")
        del node.attribute[:]
    if flat:
        graph.initializer.append(numpy_helper.from_array(np.array([0, -1]), "flat"))


def _biases(graph: onnx.GraphProto, found: list[LayerNode]) -> dict[int, np.ndarray]:
    """Position of a layer's node -> its bias, where it has one."""
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    return {
        entry.index: numpy_helper.to_array(initializers[entry.node.input[2]])
        for entry in found
        if len(entry.node.input) > 2 and entry.node.input[2] in initializers
    }


def _with_room_for_biases(
    found: list[LayerNode], biases: Mapping[int, np.ndarray], calibration: Calibration
) -> Calibration:
    """Scales of weights under which the layers' biases fit into 32 bits.

    ONNX Runtime rounds a bias to multiples of the input's scale times the weight's, and lets it
    saturate. Beside such a bias the row's weights are next to nothing: a coarser scale costs no accuracy.
    """
    roomy = dict(calibration)
    for entry in found:
        scales = roomy[entry.layer]
        if scales.input is not None and entry.index in biases:
            least = np.abs(biases[entry.index]) / (scales.input.scale * _BIAS_LIMIT)
            roomy[entry.layer] = replace(scales, weight=np.maximum(scales.weight, least).astype(np.float32))
    return roomy


def _clip_limits(graph: onnx.GraphProto) -> dict[str, float]:
    """Tensor made by a Clip -> the largest value that it lets through."""
    values = {initializer.name: initializer for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = node.attribute[0].t
    return {
        node.output[0]: float(numpy_helper.to_array(values[node.input[2]]))
        for node in graph.node
        if node.op_type == "Clip" and len(node.input) > 2 and node.input[2] in values
    }


def _owners(weights: Mapping[str, np.ndarray], calibration: Calibration) -> dict[str, str]:
    """Layer -> the first one with the same integers, under whose name they are stored."""
    first: dict[tuple[object, ...], str] = {}
    owners = {}
    for layer, scales in calibration.items():
        integers = scales.integers(weights[layer])
        content = (scales.bits, integers.shape, hashlib.blake2b(integers.data).digest())
        owners[layer] = first.setdefault((*content, scales.weight.tobytes()), layer)
    return owners
