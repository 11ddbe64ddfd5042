"""An ONNX file without what no runtime reads: node names, notes, long names, constants that stand there twice."""

from __future__ import annotations

import itertools
import string

import onnx

_PRODUCER = "ray-nascomp"
_NAMED = (".weight", "_q", ".bias")
"""Ends of the names that are kept, so that a file's weights can be told apart."""
_LETTERS = string.ascii_letters
_ALPHABET = _LETTERS + string.digits


def compact(proto: onnx.ModelProto) -> bytes:
    """The model as a file's content; inputs, outputs and weights keep their names.

    Args:
        proto: The model; changed in place.
    """
    graph = proto.graph
    subgraphs = any(attribute.HasField("g") for node in graph.node for attribute in node.attribute)
    names = {} if subgraphs else _shared_constants(graph)  # Inner graphs read tensors of the outer one by name.
    kept = {value.name for value in (*graph.input, *graph.output)}
    kept |= {constant.name for constant in graph.initializer if constant.name.endswith(_NAMED)}
    short: dict[str, str] = {}
    free = (name for name in map(_short_name, itertools.count()) if name not in kept)

    def rename(name: str) -> str:
        name = names.get(name, name)
        if name and name not in kept and name not in short:
            short[name] = next(free)
        return short.get(name, name)

    for node in graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
        if not subgraphs:
            node.input[:] = [rename(name) for name in node.input]
            node.output[:] = [rename(name) for name in node.output]
    if not subgraphs:
        for constant in graph.initializer:
            constant.name = rename(constant.name)
    for constant in graph.initializer:
        constant.ClearField("doc_string")
        del constant.metadata_props[:]
    del graph.value_info[:]
    graph.ClearField("doc_string")
    del graph.metadata_props[:]
    proto.producer_name = _PRODUCER
    proto.ClearField("producer_version")
    return proto.SerializeToString(deterministic=True)


def _shared_constants(graph: onnx.GraphProto) -> dict[str, str]:
    """Removes initializers that equal an earlier one; name of each -> name of the one that stays.

    Weights and biases that have a name stay, so that a file's size follows from the plan: those of a
    network that was never trained are equal, and no longer are after training.
    """
    first: dict[tuple[object, ...], str] = {}
    owners: dict[str, str] = {}
    unique = []
    for constant in graph.initializer:
        if constant.name.endswith(_NAMED):
            owners[constant.name] = constant.name
            unique.append(constant)
            continue
        content = onnx.TensorProto()
        content.CopyFrom(constant)
        content.ClearField("name")
        content.ClearField("doc_string")
        key = (content.SerializeToString(deterministic=True),)
        owners[constant.name] = first.setdefault(key, constant.name)
        if owners[constant.name] == constant.name:
            unique.append(constant)
    if len(unique) < len(graph.initializer):
        copies = [onnx.TensorProto.FromString(constant.SerializeToString()) for constant in unique]
        del graph.initializer[:]
        graph.initializer.extend(copies)
    return owners


def _short_name(number: int) -> str:
    """A name of two letters and digits, of three from the 3225th on: its length does not depend on the plan."""
    digits = len(_ALPHABET)
    high, low = divmod(number, digits)
    if high < len(_LETTERS):
        return _LETTERS[high] + _ALPHABET[low]
    return _short_name(high - len(_LETTERS)) + _ALPHABET[low]
