"""An ONNX file without what no runtime reads: node names, notes, long names of inner tensors."""

from __future__ import annotations

import onnx

_PRODUCER = "ray-nascomp"


def compact(proto: onnx.ModelProto) -> bytes:
    """The model as a file's content; weights keep their names.

    Args:
        proto: The model; changed in place.
    """
    graph = proto.graph
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    short: dict[str, str] = {}

    def rename(name: str) -> str:
        if not name or name in kept:
            return name
        return short.setdefault(name, f"t{len(short)}")

    subgraphs = any(attribute.HasField("g") for node in graph.node for attribute in node.attribute)
    for node in graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
        if not subgraphs:  # Inner graphs read tensors of the outer one by name.
            node.input[:] = [rename(name) for name in node.input]
            node.output[:] = [rename(name) for name in node.output]
    del graph.value_info[:]
    graph.ClearField("doc_string")
    del graph.metadata_props[:]
    proto.producer_name = _PRODUCER
    proto.ClearField("producer_version")
    return proto.SerializeToString(deterministic=True)
