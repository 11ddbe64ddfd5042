"""Where layers stand in an exported graph: what they read, and who reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx
from torch import nn

from ray_nascomp.costs.file_layout import LayerPlace
from ray_nascomp.deployment.gates import find_gates
from ray_nascomp.deployment.layer_nodes import layer_nodes
from ray_nascomp.deployment.outputs import followers_of
from ray_nascomp.deployment.readers import POSITIVE_OPS, Readers
from ray_nascomp.deployment.recurrent import nodes_of

_PASSING = ("MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")


def places_of(graph: onnx.GraphProto, network: nn.Module, layers: Iterable[str]) -> dict[str, LayerPlace]:
    """The places of a network's quantizable layers.

    Args:
        graph: The network as it was exported.
        network: The network.
        layers: Names of convolutions, linear layers, embeddings and recurrent layers.
    """
    names = list(layers)
    recurrent = [name for name in names if isinstance(network.get_submodule(name), nn.RNNBase)]
    weights: dict[str, np.ndarray] = {
        name: network.get_submodule(name).weight.detach().cpu().numpy()  # type: ignore[operator]
        for name in names
        if name not in recurrent
    }
    made_by = {output: node for node in graph.node for output in node.output}
    found = list(layer_nodes(graph, weights))
    followers = followers_of(found, Readers(graph, found))
    gates = find_gates(graph, found)
    numbers: dict[str, int] = {}
    places = {}
    for entry in found:
        own_gates = [gate for gate in gates if gate.layer == entry.index]
        tensor = entry.node.input[1 if entry.node.op_type == "Gather" else 0]
        places[entry.layer] = LayerPlace(
            entry.node.op_type,
            numbers.setdefault(tensor, len(numbers)),
            _is_positive(made_by.get(tensor), made_by),
            followers.get(entry.index),
            gates=tuple(gate.operator for gate in own_gates),
            products=sum(gate.product is not None for gate in own_gates),
        )
    for index, (name, _) in nodes_of(graph, network, recurrent).items():
        known = places.get(name, LayerPlace(graph.node[index].op_type, nodes=0))
        places[name] = replace(known, nodes=known.nodes + 1)
    return places


def _is_positive(node: onnx.NodeProto | None, made_by: dict[str, onnx.NodeProto]) -> bool:
    while node is not None and node.op_type in _PASSING and node.input:
        node = made_by.get(node.input[0])
    return node is not None and node.op_type in POSITIVE_OPS
