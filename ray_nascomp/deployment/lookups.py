"""Look-ups in tables as the layers that they are, where exporters write them in other ways: positions, mostly."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

_READERS = ("Add", "Sub", "Mul")
"""What positions go into; tied layers multiply by tables too."""


def look_up_tables(proto: onnx.ModelProto, model: nn.Module) -> onnx.ModelProto:
    """Makes a Gather of every look-up in an embedding's table, so that it is found as a layer.

    Small tables that are read whole the exporter leaves in the graph as a constant; ONNX Runtime carries the look-up
    out when it loads the file. Rows of a weight that a layer's own code indexes come as GatherND.

    Args:
        proto: The exported model; changed in place.
        model: The network.

    Returns:
        The same model.
    """
    graph = proto.graph
    tables = [
        module.weight.detach().numpy()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings > 1
    ]
    names = {
        initializer.name: initializer.dims[0]
        for initializer in graph.initializer
        if any(table.shape == tuple(initializer.dims) for table in tables)
        and any(np.array_equal(table, numpy_helper.to_array(initializer)) for table in tables)
    }
    _gather_rows(graph, names)
    _look_up_whole(graph, names)
    return proto


def _gather_rows(graph: onnx.GraphProto, tables: dict[str, int]) -> None:
    last = {
        initializer.name
        for initializer in graph.initializer
        if list(initializer.dims) == [1] and numpy_helper.to_array(initializer).item() == -1
    }
    unsqueezed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Unsqueeze" and len(node.input) == 2 and node.input[1] in last
    }
    for node in graph.node:
        if node.op_type == "GatherND" and node.input[0] in tables and node.input[1] in unsqueezed:
            node.op_type = "Gather"
            node.input[1] = unsqueezed[node.input[1]]
            del node.attribute[:]


def _look_up_whole(graph: onnx.GraphProto, tables: dict[str, int]) -> None:
    others = {name for node in graph.node if node.op_type not in _READERS for name in node.input}
    for name, count in tables.items():
        if name in others:
            continue
        rows = f"{name}_rows"
        for node in graph.node:
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = rows
        places = numpy_helper.from_array(np.arange(count, dtype=np.int32), f"{name}_places")
        graph.initializer.append(places)
        graph.node.insert(0, helper.make_node("Gather", [name, places.name], [rows], axis=0))
