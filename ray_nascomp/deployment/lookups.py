"""Look-ups that an exporter has carried out itself: those of small tables at fixed places, such as positions."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

_READERS = ("Add", "Sub", "Mul")
"""What positions go into; tied layers multiply by tables too."""


def look_up_tables(proto: onnx.ModelProto, model: nn.Module) -> onnx.ModelProto:
    """Puts back the look-up where a constant of the graph is an embedding's table, so that it is found as a layer.

    Args:
        proto: The exported model; changed in place. ONNX Runtime carries the look-up out when it loads the file.
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
    others = {name for node in graph.node if node.op_type not in _READERS for name in node.input}
    for initializer in list(graph.initializer):
        shape = tuple(initializer.dims)
        if initializer.name in others or all(table.shape != shape for table in tables):
            continue
        values = numpy_helper.to_array(initializer)
        if not any(np.array_equal(table, values) for table in tables):
            continue
        places = numpy_helper.from_array(np.arange(shape[0], dtype=np.int32), f"{initializer.name}_places")
        rows = f"{initializer.name}_rows"
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name == initializer.name:
                    node.input[place] = rows
        graph.initializer.append(places)
        graph.node.insert(0, helper.make_node("Gather", [initializer.name, places.name], [rows], axis=0))
    return proto
