"""Weights that a network shares, stored once: exporters write one copy for each use, turned where it multiplies."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
from onnx import helper, numpy_helper

_LEAST = 1024
"""Elements from which on sharing a weight is worth a node."""


def share_weights(graph: onnx.GraphProto) -> None:
    """Keeps one of equal matrices, and of those that equal another's transpose; in place.

    The transposition reads constants alone, so the runtime carries it out once, at load.
    """
    kept: dict[tuple[tuple[int, ...], bytes], str] = {}
    turned: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for alike in _alike(graph):
        for name, matrix in alike:
            if (same := kept.get(_key(matrix))) is not None:
                renamed[name] = same
            elif (other := kept.get(_key(matrix.T))) is not None:
                turned[name] = other
            else:
                kept[_key(matrix)] = name
    if not renamed and not turned:
        return
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    remaining = [entry for entry in graph.initializer if entry.name not in renamed and entry.name not in turned]
    transposes = [helper.make_node("Transpose", [source], [name], perm=[1, 0]) for name, source in turned.items()]
    nodes = [*transposes, *graph.node]
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in (*nodes, *remaining)]
    del graph.node[:]
    del graph.initializer[:]
    graph.node.extend(copies[: len(nodes)])
    graph.initializer.extend(copies[len(nodes) :])


def without_copies(graph: onnx.GraphProto) -> None:
    """Lets all read an initializer itself; of equal ones the TorchScript exporter keeps one, and copies it by nodes."""
    initializers = {entry.name for entry in graph.initializer}
    copies = [node for node in graph.node if node.op_type == "Identity" and node.input[0] in initializers]
    sources = {node.output[0]: node.input[0] for node in copies}
    for output in graph.output:
        sources.pop(output.name, None)
    for node in copies:
        if node.output[0] in sources:
            graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [sources.get(name, name) for name in node.input]


def _alike(graph: onnx.GraphProto) -> list[list[tuple[str, np.ndarray]]]:
    """Matrices that could equal each other or each other's transpose, by their sizes, first and last elements."""
    groups: dict[tuple[object, ...], list[tuple[str, np.ndarray]]] = {}
    for initializer in graph.initializer:
        if len(initializer.dims) != 2 or initializer.dims[0] * initializer.dims[1] < _LEAST:
            continue
        matrix = numpy_helper.to_array(initializer)
        corners = matrix[0, 0].tobytes(), matrix[-1, -1].tobytes()
        groups.setdefault((*sorted(matrix.shape), *corners), []).append((initializer.name, matrix))
    return [group for group in groups.values() if len(group) > 1]


def _key(matrix: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return matrix.shape, hashlib.blake2b(matrix.dtype.str.encode() + matrix.tobytes()).digest()
