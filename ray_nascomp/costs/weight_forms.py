"""Bytes of a weight and of the nodes that read it, in each form that the exporter writes.

Names, shapes and nodes are counted as `ray_nascomp.deployment` (`writer`, `stored`, `blocks`, `compact`) writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_nascomp.costs.file_layout import LayerPlace, block_size
from ray_nascomp.costs.onnx_sizes import SHORT, attribute, entry, node, tensor, varint
from ray_nascomp.model_spec import LayerSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

FLOAT = 4
DOMAIN = "com.microsoft"
TO_FLOAT = attribute("to", 1)
MUL = node("Mul", [SHORT] * 3)
_QUANTIZED, _FLOATING, _BIAS = len(".weight_q"), len("model..weight"), len("model..bias")
_INTEGER_BIAS = len(".bias_q")
_AXIS_0 = attribute("axis", 0)
_GEMM = attribute("alpha", 1.0) + attribute("beta", 1.0) + attribute("transB", 1)
_SLICE = node("Slice", [SHORT] * 5)
_BLOCK_ATTRIBUTES = entry(len(DOMAIN)) + sum(
    attribute(name, 1) for name in ("K", "N", "bits", "block_size", "accuracy_level")
)


@dataclass(frozen=True)
class Cells:
    """The matrices that stand in one place of each layer: a whole layer, or one of its factors.

    Arrays have shape `(plans, layers)` or one that spreads to it.

    Attributes:
        exist: Where there is one.
        rows: Output channels.
        columns: Input channels.
        kernel: Positions of a convolution's kernel.
        bits: Bits of the weights; 32 in floating point.
        is_table: Whether its rows are looked up.
        has_bias: Whether it holds the layer's bias.
        is_first: Whether it reads what the layer reads.
        is_last: Whether it makes what the layer makes.
    """

    exist: Flags
    rows: Floats
    columns: Floats
    kernel: Floats
    bits: Floats
    is_table: Flags
    has_bias: Flags
    is_first: Flags
    is_last: Flags


@dataclass(frozen=True)
class _Matrices:
    """Cells that exist, one after the other, and how they are written.

    Attributes:
        layer: Number of the layer.
        letters: Letters of its name, with those that factors and smoothing add.
        is_gemm: Whether its node is a Gemm.
        is_turned: Whether its weight stands transposed.
    """

    layer: NDArray[np.int64]
    rows: Floats
    columns: Floats
    kernel: Floats
    stored: Floats
    letters: Floats
    is_table: Flags
    is_gemm: Flags
    is_turned: Flags
    has_bias: Flags

    def take(self, chosen: NDArray[np.int64]) -> _Matrices:
        return _Matrices(*(values[chosen] for values in vars(self).values()))

    @property
    def count(self) -> Floats:
        return self.rows * self.columns * self.kernel

    @property
    def quantized(self) -> Floats:
        return self.letters + _QUANTIZED + self.is_turned


class WeightForms:
    """What weights take in a file, with their nodes and biases.

    Args:
        layers: Convolutions, linear layers and embeddings.
        places: Where they stand in the file of the model as it is.
        is_smoothed: Layers whose input is smoothed where it is quantized.
    """

    def __init__(self, layers: Sequence[LayerSpec], places: Sequence[LayerPlace], is_smoothed: Flags) -> None:
        self._letters = np.array([len(layer.name) for layer in layers], float)
        self.axes = np.array([max(0, len(layer.weight_shape) - 2) for layer in layers], float)
        self.is_conv = np.array([layer.kind in ("conv", "depthwise_conv") for layer in layers], bool)
        self._is_gemm = np.array([place.operator == "Gemm" for place in places], bool)
        self._is_smoothed = is_smoothed
        self._conv_attributes = np.array([_conv_attributes(layer) for layer in layers], float)
        self._unpacking = {size: self._unpacking_nodes(size) for size in (1, 2, 4)}

    def bytes_of(self, cells: Cells, is_factor: Flags) -> Floats:
        """Bytes of nodes, weights and biases, shape `(plans, layers)`.

        Args:
            cells: Where they stand.
            is_factor: Whether the layer is made of several.
        """
        m = self._matrices(cells, is_factor)
        in_blocks = (m.stored == 4) & m.is_turned & (_blocks(m.columns) > 0)
        forms = (
            (m.stored == 32, self._floating),
            ((m.stored == 8) & ~m.is_table, self._integers),
            ((m.stored == 8) & m.is_table, self._looked_up),
            (in_blocks, self._in_blocks),
            ((m.stored == 4) & ~in_blocks, self._packed),
            (m.stored == 2, self._packed),
            (m.stored == 1, self._packed),
        )
        found = np.zeros(len(m.rows))
        for where, form in forms:
            if len(chosen := where.nonzero()[0]):
                found[chosen] = form(m.take(chosen))
        total = np.zeros(cells.exist.shape)
        total[cells.exist] = found
        return total

    def _matrices(self, cells: Cells, is_factor: Flags) -> _Matrices:
        where = cells.exist.nonzero()
        layer = where[1]

        def at(values: NDArray[Any]) -> NDArray[Any]:
            return np.broadcast_to(values, cells.exist.shape)[where]

        stored, is_table, has_bias = stored_bits(at(cells.bits)), at(cells.is_table), at(cells.has_bias)
        is_gemm = self._is_gemm[layer] & has_bias
        is_turned = ~self.is_conv[layer] & ~is_gemm & ~is_table
        is_smoothed = self._is_smoothed[layer] & (stored == 8) & ~is_table
        letters = self._letters[layer] + 2.0 * at(is_factor) + 2.0 * is_smoothed
        return _Matrices(
            layer,
            at(cells.rows),
            at(cells.columns),
            at(cells.kernel),
            stored,
            letters,
            is_table,
            is_gemm,
            is_turned,
            has_bias,
        )

    def _floating(self, m: _Matrices) -> Floats:
        name = np.where(m.is_turned, SHORT, m.letters + _FLOATING)
        weight = tensor(name, [m.rows, m.columns], m.count * FLOAT, self.axes[m.layer])
        return np.asarray(weight + self._nodes(m, name))

    def _integers(self, m: _Matrices) -> Floats:
        weight = tensor(m.quantized, [m.rows, m.columns], m.count, self.axes[m.layer])
        scales = tensor(SHORT, [m.rows], m.rows * FLOAT)
        dequantize = node("DequantizeLinear", [m.quantized, SHORT, SHORT, SHORT], _AXIS_0)
        return np.asarray(weight + scales + dequantize + self._nodes(m, SHORT))

    def _looked_up(self, m: _Matrices) -> Floats:
        weight = tensor(m.quantized, [m.rows, m.columns], m.count)
        cast = node("Cast", [SHORT, SHORT], TO_FLOAT)
        return np.asarray(weight + cast + self._lookup(m) + self._nodes(m, SHORT))

    def _in_blocks(self, m: _Matrices) -> Floats:
        size = _blocks(m.columns)
        blocks = np.ceil(m.columns / size)
        name = m.letters + _QUANTIZED + 1
        weight = tensor(name, [m.rows, blocks], m.rows * blocks * size / 2, 1)
        scales = tensor(SHORT, [m.rows * blocks], m.rows * blocks * FLOAT)
        product = node("MatMulNBits", [SHORT, name, SHORT, SHORT], _BLOCK_ATTRIBUTES)
        further = varint(m.columns) + varint(m.rows) + varint(size) - 3 - node("MatMul", [SHORT] * 3)
        return np.asarray(weight + scales + product + further + self._nodes(m, SHORT))

    def _packed(self, m: _Matrices) -> Floats:
        size = int(m.stored[0])
        planes = 8 // size
        is_conv = self.is_conv[m.layer]
        last = np.where(is_conv, m.count, np.where(m.is_turned, m.rows, m.columns))
        lead = np.where(is_conv, 1, np.where(m.is_turned, m.columns, m.rows))
        width = np.ceil(last * size / 8)
        weight = tensor(m.quantized, [lead, width], lead * width) + np.where(last * size % 8 != 0, _SLICE, 0)
        read = np.where(m.is_table, SHORT, m.quantized)
        unpacking = self._unpacking[size][m.layer] + planes * (read - self._letters[m.layer])
        scales = tensor(SHORT, [m.rows], m.rows * FLOAT, self.axes[m.layer] + 1) + MUL
        return np.asarray(weight + unpacking + np.where(m.is_table, self._lookup(m), scales) + self._nodes(m, SHORT))

    def _lookup(self, m: _Matrices) -> Any:
        """Nodes and scales of rows that are looked up as integers; the node in floating point goes."""
        lookup = node("Gather", [SHORT] * 3, _AXIS_0)
        scales = tensor(SHORT, [m.rows], m.rows * FLOAT, 1)
        return m.quantized - SHORT + 2 * lookup + MUL + scales - node("Gather", [SHORT] * 3)

    def _nodes(self, m: _Matrices, weight: Any) -> Any:
        """Nodes that multiply or look up, with a weight's name of so many letters; and biases."""
        inner = entry(SHORT) + entry(SHORT) + entry(weight)
        conv = entry(inner + entry(len("Conv")) + self._conv_attributes[m.layer])
        matrix = entry(inner + entry(len("MatMul")) + np.where(m.is_gemm, _GEMM + len("Gemm") - len("MatMul"), 0))
        name = m.letters + _BIAS
        bias = tensor(name, [m.rows], m.rows * FLOAT) + entry(name) + np.where(m.is_turned, node("Add", [SHORT] * 2), 0)
        return np.where(self.is_conv[m.layer], conv, matrix) + np.where(m.has_bias, bias, 0)

    def integer_biases(self, cells: Cells) -> Floats:
        """What it takes more where a linear layer's bias is an integer, too; shape `(plans, layers)`."""
        name = self._letters + _INTEGER_BIAS
        dequantize = node("DequantizeLinear", [name, SHORT, SHORT], _AXIS_0)
        scales = tensor(SHORT, [cells.rows], cells.rows * FLOAT)
        saved = (_BIAS - _INTEGER_BIAS) + (self._letters + _BIAS - SHORT)
        return np.asarray(np.where(self._is_gemm & cells.has_bias, dequantize + scales - saved, 0))

    def are_in_blocks(self, cells: Cells) -> Flags:
        """Where ONNX Runtime multiplies by 4 bits itself."""
        turned = ~self.is_conv & ~(self._is_gemm & cells.has_bias) & ~cells.is_table
        found = cells.exist & turned & ((cells.bits == 3) | (cells.bits == 4))
        found[found] = _blocks(np.broadcast_to(cells.columns, found.shape)[found]) > 0
        return np.asarray(found)

    def last_axis(self, cells: Cells) -> Floats:
        """Elements of the axis along which integers are packed."""
        turned = ~(self._is_gemm & cells.has_bias) & ~cells.is_table
        flat = np.where(turned, cells.rows, cells.columns)
        return np.where(self.is_conv, cells.rows * cells.columns * cells.kernel, flat)

    def _unpacking_nodes(self, size: int) -> Floats:
        """Nodes that unpack a weight whose name has as many letters as its layer's, without its slice."""
        name = self._letters
        planes = 8 // size
        conv = np.where(self.is_conv, node("Reshape", [SHORT] * 3), 0)
        sign = MUL if size == 1 else 0
        return np.asarray(
            node("BitwiseAnd", [name, SHORT, SHORT])
            + (planes - 1)
            * (
                node("BitShift", [name, SHORT, SHORT], attribute("direction", "RIGHT"))
                + node("BitwiseAnd", [SHORT] * 3)
            )
            + node("Concat", [SHORT] * (planes + 1), attribute("axis", -1))
            + conv
            + node("Cast", [SHORT, SHORT], TO_FLOAT)
            + sign
            + node("Sub", [SHORT] * 3)
        )


def stored_bits(bits: Floats) -> Floats:
    """Bits that each integer takes in the file: those of 3 bits are stored in 4."""
    return np.asarray(np.where(bits == 3, 4.0, bits))


def _blocks(columns: Floats) -> Floats:
    """`file_layout.block_size` of each element, 0 for none."""
    sizes = _block_sizes(1 << int(columns.max(initial=0)).bit_length())
    return np.asarray(sizes[columns.astype(int)])


@lru_cache(maxsize=32)
def _block_sizes(limit: int) -> Floats:
    return np.array([block_size(columns) or 0 for columns in range(limit)], float)


def _conv_attributes(layer: LayerSpec) -> int:
    axes = max(0, len(layer.weight_shape) - 2)
    group = layer.weight_shape[0] if layer.kind == "depthwise_conv" else 1
    sizes = [attribute(name, [1] * axes) for name in ("dilations", "kernel_shape", "strides")]
    return sum(sizes) + attribute("pads", [0] * 2 * axes) + attribute("group", group)
