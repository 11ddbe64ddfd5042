"""Recurrent layers with integer weights.

ONNX Runtime computes LSTMs in integers, with weights of 8 bits (7 of them used, so that nothing
saturates) and inputs quantized as they come; that is two to three times faster. It has no integer
GRU: there, and for fewer bits, weights are stored as integers and unfolded when the file is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from ray_nascomp.compression.rounding import channel_scales, round_nearest
from ray_nascomp.compression.static import weight_scales
from ray_nascomp.deployment.editor import GraphEditor
from ray_nascomp.deployment.stored import NodeList, unfold

# Torch's gates in the order in which ONNX has them: r z n -> z r n, and i f g o -> i o f g.
_GATES = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
_OPERATORS = ("GRU", "LSTM", "RNN")
_WEIGHT_INPUTS = (1, 2)
_LSTM_LIMIT = 64
"""Largest magnitude of an integer of ONNX Runtime's reduced range."""


def round_recurrent(network: nn.Module, bits: Mapping[str, int]) -> None:
    """Rounds the weights of recurrent layers in place to what their integers in the file will be.

    Args:
        network: The network.
        bits: Name of a recurrent layer -> bits of its weights, 1..8.
    """
    for name, count in bits.items():
        layer: Any = network.get_submodule(name)
        in_integers = layer.mode == "LSTM" and count == 8
        for parameter_name, parameter in layer.named_parameters():
            if not parameter_name.startswith("weight"):
                continue
            weight = parameter.detach().cpu().float()
            if in_integers:
                rounded = round_nearest(weight, channel_scales(weight, _LSTM_LIMIT), _LSTM_LIMIT)
            else:
                scales = weight_scales(weight, count)
                rounded = torch.from_numpy(scales.integers(weight.numpy()) * scales.weight[:, None])
            parameter.data.copy_(rounded)


def quantize_recurrent(proto: onnx.ModelProto, network: nn.Module, bits: Mapping[str, int]) -> onnx.ModelProto:
    """The model with integer weights in recurrent layers; LSTMs of 8 bits also compute in integers.

    Args:
        proto: The exported model, its recurrent weights in floating point; not changed.
        network: The network that it was exported from.
        bits: Name of an LSTM, GRU or RNN -> bits of its weights, 1..8.

    Raises:
        ValueError: If a layer is not in the graph.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    owners = _nodes_of(result.graph, network, bits)
    editor = GraphEditor(result.graph)
    in_integers = []
    for index, layer in owners.items():
        node = result.graph.node[index]
        if node.op_type == "LSTM" and bits[layer] == 8:
            node.name = node.name or f"{layer}_{index}"
            in_integers.append(node.name)
        else:
            _store(editor, result.graph, index, layer, bits[layer])
    editor.finish()
    if in_integers:
        result = _with_integer_lstms(result, in_integers)
    onnx.checker.check_model(result)
    return result


def _nodes_of(graph: onnx.GraphProto, network: nn.Module, bits: Mapping[str, int]) -> dict[int, str]:
    """Position of each node of the layers -> the layer's name; several for layers that are stacked."""
    wanted = {}
    for name in bits:
        layer: Any = network.get_submodule(name)
        for depth in range(layer.num_layers):
            wanted[_input_weights(layer, depth).tobytes()] = (name, depth)
    initializers = {entry.name: entry for entry in graph.initializer}
    owners, found = {}, set()
    for index, node in enumerate(graph.node):
        if node.op_type in _OPERATORS and node.input[1] in initializers:
            match = wanted.get(numpy_helper.to_array(initializers[node.input[1]]).tobytes())
            if match is not None:
                owners[index] = match[0]
                found.add(match)
    missing = sorted({name for name, depth in wanted.values() if (name, depth) not in found})
    if missing:
        raise ValueError(f"recurrent layers {missing} are not in the exported graph")
    return owners


def _input_weights(layer: Any, depth: int) -> np.ndarray:
    """The weights for a layer's inputs as ONNX has them, shape `(directions, gates * hidden, inputs)`."""
    directions = [""] + ["_reverse"] * layer.bidirectional
    stacked = []
    for direction in directions:
        weight = getattr(layer, f"weight_ih_l{depth}{direction}").detach().cpu().float().numpy()
        gates = np.split(weight, len(_GATES[layer.mode]))
        stacked.append(np.concatenate([gates[gate] for gate in _GATES[layer.mode]]))
    return np.stack(stacked)


def _store(editor: GraphEditor, graph: onnx.GraphProto, index: int, layer: str, bits: int) -> None:
    node = graph.node[index]
    initializers = {entry.name: entry for entry in graph.initializer}
    for position in _WEIGHT_INPUTS:
        weight = numpy_helper.to_array(initializers[node.input[position]])
        rows = weight.reshape(-1, weight.shape[-1])
        scales = weight_scales(torch.from_numpy(rows.copy()), bits)
        added = NodeList(f"{layer}.weight{index}_{position}", f"{layer}.unfolded{index}_{position}")
        values = unfold(added, scales.integers(rows).reshape(weight.shape), bits, onnx.TensorProto.FLOAT)
        factors = added.constant("s", scales.weight.reshape(*weight.shape[:-1], 1))
        node.input[position] = added.node("Mul", [values, factors])
        editor.before(index, added)


def _with_integer_lstms(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    # Says that nothing is left to fold, on which ONNX Runtime otherwise warns.
    add_pre_process_metadata(proto)
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        quantize_dynamic(
            proto,
            path,
            op_types_to_quantize=["LSTM"],
            nodes_to_quantize=names,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        result = onnx.load(path)
    del result.metadata_props[:]
    return result
