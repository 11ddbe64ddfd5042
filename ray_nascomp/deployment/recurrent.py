"""Recurrent layers with integer weights.

ONNX Runtime computes LSTMs in integers, with weights of 8 bits (7 of them used, so that nothing
saturates) and inputs quantized as they come; that is two to three times faster. It has no integer
GRU: there, for fewer bits, and where 8 bits do not hold an LSTM's inputs, weights are stored as
integers and unfolded when the file is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ray_nascomp.compression.rounding import affine_range, channel_scales, round_affine, round_nearest
from ray_nascomp.compression.static import weight_scales
from ray_nascomp.deployment.editor import GraphEditor
from ray_nascomp.deployment.stored import NodeList, unfold
from ray_nascomp.tasks.calling import call

# Torch's gates in the order in which ONNX has them: r z n -> z r n, and i f g o -> i o f g.
_GATES = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
_OPERATORS = ("GRU", "LSTM", "RNN")
_WEIGHT_INPUTS = (1, 2)
_LSTM_LIMIT = 64
"""Largest magnitude of an integer of ONNX Runtime's reduced range."""
_DOMAIN = "com.microsoft"
_MAX_INPUT_ERROR = 0.05


def lstms_with_floating_inputs(network: nn.Module, bits: Mapping[str, int], inputs: Any) -> set[str]:
    """LSTMs of 8 bits whose inputs 8 bits do not hold.

    ONNX Runtime rounds the inputs of a batch to multiples of one scale. Of inputs that span orders of
    magnitude, as spectra do that are not logarithmic, the smaller ones are then lost.

    Args:
        network: The network, in evaluation mode.
        bits: Name of a recurrent layer -> bits of its weights, 1..8.
        inputs: A batch that it is run on.
    """
    found = set()
    handles = []
    for name, count in bits.items():
        layer = network.get_submodule(name)
        if count == 8 and isinstance(layer, nn.LSTM):

            def compare(layer: Any, arguments: Any, keywords: Any, output: Any, name: str = name) -> None:
                given = inspect.signature(layer.forward).bind(*arguments, **keywords)
                given.arguments["input"] = _rounded(given.arguments["input"])
                expected = output[0].data
                change = layer.forward(*given.args, **given.kwargs)[0].data - expected
                if change.norm() > _MAX_INPUT_ERROR * expected.norm():
                    found.add(name)

            handles.append(layer.register_forward_hook(compare, with_kwargs=True))
    try:
        with torch.no_grad():
            call(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _rounded(values: Any) -> Any:
    if isinstance(values, PackedSequence):
        return values._replace(data=_rounded(values.data))
    return round_affine(values, *affine_range(float(values.min()), float(values.max())))


def round_recurrent(network: nn.Module, bits: Mapping[str, int], floating_inputs: Collection[str] = ()) -> None:
    """Rounds the weights of recurrent layers in place to what their integers in the file will be.

    Args:
        network: The network.
        bits: Name of a recurrent layer -> bits of its weights, 1..8.
        floating_inputs: LSTMs whose inputs stay in floating point.
    """
    for name, count in bits.items():
        layer: Any = network.get_submodule(name)
        for parameter_name, parameter in layer.named_parameters():
            if not parameter_name.startswith("weight"):
                continue
            weight = parameter.detach().cpu().float()
            is_first = parameter_name.removesuffix("_reverse").endswith("_l0")
            if layer.mode == "LSTM" and count == 8 and not (is_first and name in floating_inputs):
                rounded = round_nearest(weight, channel_scales(weight, _LSTM_LIMIT), _LSTM_LIMIT)
            else:
                scales = weight_scales(weight, count)
                rounded = torch.from_numpy(scales.integers(weight.numpy()) * scales.weight[:, None])
            parameter.data.copy_(rounded)


def quantize_recurrent(
    proto: onnx.ModelProto, network: nn.Module, bits: Mapping[str, int], floating_inputs: Collection[str] = ()
) -> onnx.ModelProto:
    """The model with integer weights in recurrent layers; LSTMs of 8 bits also compute in integers.

    Args:
        proto: The exported model, its recurrent weights in floating point; not changed.
        network: The network that it was exported from.
        bits: Name of an LSTM, GRU or RNN -> bits of its weights, 1..8.
        floating_inputs: LSTMs whose inputs stay in floating point, and with them the first of their layers.

    Raises:
        ValueError: If a layer is not in the graph.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    owners = nodes_of(result.graph, network, bits)
    editor = GraphEditor(result.graph)
    for index, (layer, depth) in owners.items():
        is_floating = depth == 0 and layer in floating_inputs
        if result.graph.node[index].op_type == "LSTM" and bits[layer] == 8 and not is_floating:
            _compute_in_integers(editor, result.graph, index, layer)
        else:
            _store(editor, result.graph, index, layer, bits[layer])
    editor.finish()
    if any(node.domain == _DOMAIN for node in result.graph.node):
        result.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    onnx.checker.check_model(result)
    return result


def nodes_of(graph: onnx.GraphProto, network: nn.Module, layers: Iterable[str]) -> dict[int, tuple[str, int]]:
    """Position of each node of recurrent layers -> the layer's name, and which of its stacked layers it is, from 0.

    Raises:
        ValueError: If a layer is not in the graph.
    """
    wanted = {}
    for name in layers:
        layer: Any = network.get_submodule(name)
        for depth in range(layer.num_layers):
            wanted[_input_weights(layer, depth).tobytes()] = (name, depth)
    initializers = {entry.name: entry for entry in graph.initializer}
    owners, found = {}, set()
    for index, node in enumerate(graph.node):
        if node.op_type in _OPERATORS and node.input[1] in initializers:
            match = wanted.get(numpy_helper.to_array(initializers[node.input[1]]).tobytes())
            if match is not None:
                owners[index] = match
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


def _compute_in_integers(editor: GraphEditor, graph: onnx.GraphProto, index: int, layer: str) -> None:
    node = graph.node[index]
    initializers = {entry.name: entry for entry in graph.initializer}
    added = NodeList(f"{layer}.weight{index}", f"{layer}.integers{index}")
    quantization = []
    for position in _WEIGHT_INPUTS:
        weight = torch.from_numpy(numpy_helper.to_array(initializers[node.input[position]]).copy())
        rows = weight.flatten(0, 1)
        scales = channel_scales(rows, _LSTM_LIMIT)
        integers = (rows / scales[:, None]).round().clamp(-_LSTM_LIMIT, _LSTM_LIMIT).reshape(weight.shape)
        # The operator reads weights by their inputs.
        turned = integers.transpose(1, 2).to(torch.int8).numpy()
        node.input[position] = added.constant(f"{position}_q", turned)
        shape = weight.shape[:2]
        quantization.append(added.constant(f"{position}_s", scales.reshape(shape).numpy()))
        quantization.append(added.constant("z", np.zeros(shape, np.int8)))
    state = [*node.input[3:], "", "", "", ""][:5]
    node.input[3:] = [*state, *quantization]
    node.op_type, node.domain = "DynamicQuantizeLSTM", _DOMAIN
    kept = [attribute for attribute in node.attribute if attribute.name != "layout"]  # It knows the usual one alone.
    del node.attribute[:]
    node.attribute.extend(kept)
    editor.before(index, added)
