"""Integer weights in a file: packed several to a byte, and unfolded by standard nodes.

ONNX Runtime computes nodes that read constants alone once, when it loads the file. A weight that
is stored as integers, cast and multiplied therefore runs as fast as one stored in floating point,
whereas a DequantizeLinear that no integer kernel takes in is computed anew in every run.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ray_nascomp.errors import ConfigError

_KINDS = ("conv", "depthwise_conv", "linear", "embedding", "recurrent")
UNPACKING_OPSET = 18
"""Least opset in which packed integers can be unfolded."""


def stored_bits(kind: str, bits: int) -> int:
    """Bits that each weight takes in the file.

    Bytes hold 8, 4, 2 or 1 bits' integers without waste; of what lies between, the next larger
    form is used. 32 bits are floating point.

    Args:
        kind: "conv", "depthwise_conv", "linear", "embedding" or "recurrent".
        bits: Bits of the weight's integers, 1..8, or 32.

    Raises:
        ConfigError: For another kind or number of bits.
    """
    if kind not in _KINDS:
        raise ConfigError.unknown("kind", kind, _KINDS)
    if bits == 32:
        return 32
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits: {bits!r} was given, 1..8 or 32 are allowed")
    return next(size for size in (1, 2, 4, 8) if size >= bits)


def pack(integers: np.ndarray, size: int) -> np.ndarray:
    """Unsigned integers of 1, 2 or 4 bits, packed into bytes along the last axis.

    The last axis is cut into as many equal parts as fit into a byte, the first in the lowest
    bits, so that unpacking needs a concatenation and no interleaving.

    Args:
        integers: Values in `0..2^size - 1`, shape `(..., n)`.
        size: Bits an integer.

    Returns:
        Shape `(..., ceil(n * size / 8))`, uint8.
    """
    parts = 8 // size
    width = -(-integers.shape[-1] // parts)
    padding = [(0, 0)] * (integers.ndim - 1) + [(0, width * parts - integers.shape[-1])]
    planes = np.split(np.pad(integers.astype(np.uint8), padding), parts, axis=-1)
    packed = planes[0].copy()
    for index, plane in enumerate(planes[1:], start=1):
        packed |= plane << np.uint8(size * index)
    return packed


@dataclass
class NodeList:
    """Nodes and constants under way into a graph.

    Attributes:
        prefix: What the names of constants begin with.
        place: What the names of computed tensors begin with, unique in the graph.
        nodes: The nodes, in the order in which they run.
        constants: The initializers that they read.
    """

    prefix: str
    place: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def constant(self, name: str, array: np.ndarray) -> str:
        """Adds an initializer; its name."""
        full = f"{self.prefix}_{name}"
        if all(constant.name != full for constant in self.constants):
            self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), full))
        return full

    def node(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        """Adds a node with one output; the output's name."""
        output = f"{self.place}_{next(self._numbers)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output


def unfold(target: NodeList, integers: np.ndarray, bits: int, data_type: int) -> str:
    """Stores a weight's integers and unfolds them.

    Args:
        target: Where nodes and constants go.
        integers: int8, any shape.
        bits: Bits of the integers; of 1 bit they are -1 and +1.
        data_type: FLOAT or INT8 of `onnx.TensorProto`.

    Returns:
        Name of the integers as a tensor of that type, of their own shape.
    """
    size = stored_bits("linear", bits)
    if size == 8:
        stored = target.constant("q", integers)
        return stored if data_type == TensorProto.INT8 else target.node("Cast", [stored], to=data_type)
    rows = _unsigned(integers, bits)
    if integers.ndim != 2:
        rows = rows.reshape(1, -1)
    values = _unpack(target, target.constant("q", pack(rows, size)), size, rows.shape[1])
    if integers.ndim != 2:
        values = target.node("Reshape", [values, target.constant("shape", np.array(integers.shape, np.int64))])
    values = _centred(target, values, bits)
    return values if data_type == TensorProto.FLOAT else target.node("Cast", [values], to=data_type)


def unfold_rows(target: NodeList, integers: np.ndarray, bits: int, indices: str) -> str:
    """Stores an embedding's integers and unfolds the rows that are looked up.

    Args:
        target: Where nodes and constants go.
        integers: int8, shape `(rows, features)`.
        bits: Bits of the integers.
        indices: Name of the tensor of row numbers.

    Returns:
        Name of the rows' integers in floating point, shape `(*indices, features)`.
    """
    size = stored_bits("embedding", bits)
    if size == 8:
        values = target.node("Gather", [target.constant("q", integers), indices], axis=0)
        return target.node("Cast", [values], to=TensorProto.FLOAT)
    table = target.constant("q", pack(_unsigned(integers, bits), size))
    values = target.node("Gather", [table, indices], axis=0)
    return _centred(target, _unpack(target, values, size, integers.shape[1]), bits)


def _unpack(target: NodeList, packed: str, size: int, count: int) -> str:
    """The packed integers as uint8, `count` along the last axis."""
    mask = target.constant("mask", np.array(2**size - 1, np.uint8))
    planes = [target.node("BitwiseAnd", [packed, mask])]
    for index in range(1, 8 // size):
        shift = target.constant(f"shift{index}", np.array(size * index, np.uint8))
        shifted = target.node("BitShift", [packed, shift], direction="RIGHT")
        planes.append(target.node("BitwiseAnd", [shifted, mask]))
    values = target.node("Concat", planes, axis=-1)
    if count * size % 8 == 0:
        return values
    bounds = [("start", 0), ("end", count), ("axis", -1)]
    return target.node("Slice", [values, *(target.constant(name, np.array([at], np.int64)) for name, at in bounds)])


def _unsigned(integers: np.ndarray, bits: int) -> np.ndarray:
    """The integers from zero on; -1 and +1 of one bit become 0 and 1."""
    if bits == 1:
        return (integers > 0).astype(np.uint8)
    return (integers.astype(np.int16) + _offset(bits)).astype(np.uint8)


def _centred(target: NodeList, values: str, bits: int) -> str:
    """The integers in floating point from what `_unsigned` has made of them."""
    values = target.node("Cast", [values], to=TensorProto.FLOAT)
    if bits == 1:
        values = target.node("Mul", [values, target.constant("two", np.array(2, np.float32))])
    return target.node("Sub", [values, target.constant("offset", np.array(_offset(bits), np.float32))])


def _offset(bits: int) -> int:
    return max(1, 2 ** (bits - 1) - 1)
