"""Bytes of the exported file of many plans at once, from what the exporter writes for each form of a layer.

Nothing here is fitted: names, shapes, nodes and constants are counted as `ray_nascomp.deployment`
(`qdq`, `stored`, `recurrent`, `compact`) writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_nascomp.file_layout import FileLayout, LayerPlace
from ray_nascomp.file_sizes import SHORT, attribute, entry, node, scalar, tensor, varint
from ray_nascomp.model_spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

_FLOAT = 4
_MATRICES = ("conv", "depthwise_conv", "linear", "embedding")
_UNKNOWN_FILE, _UNKNOWN_LAYER = 60, 120
"""Bytes beside layers of a file, and for each of its layers, where no file was measured."""
_QUANTIZED, _FLOATING, _BIAS = len(".weight_q"), len("model..weight"), len("model..bias")
_TO_FLOAT, _AXIS_0 = attribute("to", 1), attribute("axis", 0)
_PAIR = scalar(_FLOAT) + node("QuantizeLinear", [SHORT] * 4) + node("DequantizeLinear", [SHORT] * 4)
"""An activation's scale, its quantization and its return; beside them stands a zero point."""
_GEMM = attribute("alpha", 1.0) + attribute("beta", 1.0) + attribute("transB", 1)
_SLICE = node("Slice", [SHORT] * 5)
_MUL = node("Mul", [SHORT] * 3)


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


class FileModel:
    """What layers and graphs take in a file.

    Arrays of layers hold the convolutions, linear layers and embeddings alone, in the architecture's order.

    Args:
        spec: The architecture.
        layout: The file of the model as it is.
    """

    def __init__(self, spec: ModelSpec, layout: FileLayout) -> None:
        self._recurrent = np.array([_recurrent(layer, layout.places.get(layer.name)) for layer in spec.layers])
        layers = [layer for layer in spec.layers if layer.kind in _MATRICES]
        places = [layout.places.get(layer.name, LayerPlace(_usual_operator(layer))) for layer in layers]
        self._letters = np.array([len(layer.name) for layer in layers], float)
        self._axes = np.array([max(0, len(layer.weight_shape) - 2) for layer in layers], float)
        self._is_conv = np.array([layer.kind in ("conv", "depthwise_conv") for layer in layers])
        self._is_linear = np.array([layer.kind in ("linear", "embedding") for layer in layers])
        self._is_gemm = np.array([place.operator == "Gemm" for place in places])
        self._smoothed = np.array([layout.is_smoothed for _ in layers]) & self._is_linear
        self._unknown = _UNKNOWN_FILE + _UNKNOWN_LAYER * len(spec.layers)
        self._conv_attributes = np.array([_conv_attributes(layer) for layer in layers], float)
        self._set_inputs(layers, places)
        self._unpacking = {size: self._unpacking_nodes(size) for size in (1, 2, 4)}

    def unknown_rest(self) -> float:
        """Bytes beside the layers, where no file was measured."""
        return float(self._unknown)

    def recurrent(self) -> Floats:
        """Bytes of recurrent layers of 8 bits beside one for each parameter, shape `(all layers,)`."""
        return self._recurrent

    def layers(self, cells: Cells, is_factor: Flags) -> Floats:
        """Bytes of nodes, weights and biases, shape `(plans, layers)`.

        Args:
            cells: Where they stand.
            is_factor: Whether the layer is made of several.
        """
        m = self._matrices(cells, is_factor)
        forms = (
            (m.stored == 32, self._floating),
            ((m.stored == 8) & ~m.is_table, self._integers),
            ((m.stored == 8) & m.is_table, self._looked_up),
            (m.stored == 4, self._packed),
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

        stored, is_table, has_bias = _stored(at(cells.bits)), at(cells.is_table), at(cells.has_bias)
        is_gemm = self._is_gemm[layer] & has_bias
        is_turned = self._is_linear[layer] & ~is_gemm & ~is_table
        is_smoothed = self._smoothed[layer] & (stored == 8) & ~is_table
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
        weight = tensor(name, [m.rows, m.columns], m.count * _FLOAT, self._axes[m.layer])
        return np.asarray(weight + self._nodes(m, name))

    def _integers(self, m: _Matrices) -> Floats:
        weight = tensor(m.quantized, [m.rows, m.columns], m.count, self._axes[m.layer])
        scales = tensor(SHORT, [m.rows], m.rows * _FLOAT)
        dequantize = node("DequantizeLinear", [m.quantized, SHORT, SHORT, SHORT], _AXIS_0)
        return np.asarray(weight + scales + dequantize + self._nodes(m, SHORT))

    def _looked_up(self, m: _Matrices) -> Floats:
        weight = tensor(m.quantized, [m.rows, m.columns], m.count)
        cast = node("Cast", [SHORT, SHORT], _TO_FLOAT)
        return np.asarray(weight + cast + self._lookup(m) + self._nodes(m, SHORT))

    def _packed(self, m: _Matrices) -> Floats:
        size = int(m.stored[0])
        planes = 8 // size
        is_conv = self._is_conv[m.layer]
        last = np.where(is_conv, m.count, np.where(m.is_turned, m.rows, m.columns))
        lead = np.where(is_conv, 1, np.where(m.is_turned, m.columns, m.rows))
        width = np.ceil(last * size / 8)
        weight = tensor(m.quantized, [lead, width], lead * width) + np.where(last * size % 8 != 0, _SLICE, 0)
        read = np.where(m.is_table, SHORT, m.quantized)
        unpacking = self._unpacking[size][m.layer] + planes * (read - self._letters[m.layer])
        scales = tensor(SHORT, [m.rows], m.rows * _FLOAT, self._axes[m.layer] + 1) + _MUL
        return np.asarray(weight + unpacking + np.where(m.is_table, self._lookup(m), scales) + self._nodes(m, SHORT))

    def _lookup(self, m: _Matrices) -> Any:
        """Nodes and scales of rows that are looked up as integers; the node in floating point goes."""
        lookup = node("Gather", [SHORT] * 3, _AXIS_0)
        scales = tensor(SHORT, [m.rows], m.rows * _FLOAT, 1)
        return m.quantized - SHORT + 2 * lookup + _MUL + scales - node("Gather", [SHORT] * 3)

    def _nodes(self, m: _Matrices, weight: Any) -> Any:
        """Nodes that multiply or look up, with a weight's name of so many letters; and biases."""
        inner = entry(SHORT) + entry(SHORT) + entry(weight)
        conv = entry(inner + entry(len("Conv")) + self._conv_attributes[m.layer])
        matrix = entry(inner + entry(len("MatMul")) + np.where(m.is_gemm, _GEMM + len("Gemm") - len("MatMul"), 0))
        name = m.letters + _BIAS
        bias = (
            tensor(name, [m.rows], m.rows * _FLOAT) + entry(name) + np.where(m.is_turned, node("Add", [SHORT] * 2), 0)
        )
        return np.where(self._is_conv[m.layer], conv, matrix) + np.where(m.has_bias, bias, 0)

    def shared(self, cells: Sequence[Cells]) -> Floats:
        """Bytes of what several layers share: activations' quantization, equal constants; shape `(plans,)`."""
        integers = [c.exist & (c.bits == 8) & ~c.is_table & (self._is_conv | self._is_linear) for c in cells]
        total = np.zeros(len(cells[0].exist))
        if any(where.any() for where in integers):
            total = total + self._activations(cells, integers)
            rows = np.concatenate([np.where(w, c.rows, 0) for w, c in zip(integers, cells, strict=True)], axis=1)
            total += _of_distinct(rows, tensor(SHORT, [rows], rows))
        packed = [c.exist & (_stored(c.bits) < 8) for c in cells]
        if any(where.any() for where in packed):
            total = total + self._packing(cells, packed)
        return total

    def _set_inputs(self, layers: Sequence[LayerSpec], places: Sequence[LayerPlace]) -> None:
        index = {layer.name: number for number, layer in enumerate(layers)}
        numbers = [place.input if place.input >= 0 else -1 - number for number, place in enumerate(places)]
        columns = {number: column for column, number in enumerate(dict.fromkeys(numbers))}
        self._reads = np.zeros((len(layers), len(columns)))
        self._is_positive = np.zeros(len(columns), bool)
        self._followers = np.zeros((len(layers), len(layers)))
        self._is_followed = np.array([place.followers is not None for place in places])
        for layer, (place, number) in enumerate(zip(places, numbers, strict=True)):
            self._reads[layer, columns[number]] = 1
            self._is_positive[columns[number]] |= place.is_positive
            for name in place.followers or ():
                if name in index:
                    self._followers[index[name], layer] = 1

    def _activations(self, cells: Sequence[Cells], integers: Sequence[Flags]) -> Floats:
        """Quantization of activations, and the factors that smooth them."""
        pairs = list(zip(integers, cells, strict=True))
        reading = np.add.reduce([1.0 * (where & c.is_first) for where, c in pairs])
        inner = np.add.reduce([1.0 * (where & ~c.is_first) for where, c in pairs])
        last = np.add.reduce([1.0 * (where & c.is_last) for where, c in pairs])
        read = reading @ self._reads > 0
        followed = self._is_followed & (reading @ self._followers >= self._followers.sum(0))
        outputs = (last * self._is_conv * ~followed).sum(1)
        count = read.sum(1) + inner.sum(1) + outputs
        zeros = read & self._is_positive
        own = count - zeros.sum(1) + zeros.any(1)
        total = count * _PAIR + own * scalar(1)
        if self._smoothed.any():
            for where, c in pairs:
                smoothed = where & self._smoothed
                factor = np.where(smoothed, tensor(SHORT, [c.columns], c.columns * _FLOAT) + _MUL, 0)
                total = total + np.where(c.is_first, 0, factor).sum(1)
                readers = np.where(smoothed & c.is_first, 1.0, 0.0) @ self._reads
                of_inputs = np.where(c.is_first, factor, 0) @ self._reads
                total = total + (of_inputs / np.maximum(readers, 1)).sum(1)
        return np.asarray(total)

    def _packing(self, cells: Sequence[Cells], packed: Sequence[Flags]) -> Floats:
        """Constants with which packed integers are unfolded; equal ones are stored once."""
        pairs = list(zip(packed, cells, strict=True))
        has = {bits: np.any([(w & (c.bits == bits)).any(1) for w, c in pairs], axis=0) for bits in (1, 2, 3, 4)}
        # Masks and shifts: 1 to 7; 3, 2, 4 and 6; 15 and 4. Offsets 7, 3, 1, and a factor of 2.
        four = has[3] | has[4]
        bytes_ = np.where(has[1], 7, np.where(has[2], 4, 0)) + four * (1 + ~(has[1] | has[2]))
        floats = 1.0 * has[4] + has[3] + (has[2] | has[1]) + has[1]
        total = bytes_ * scalar(1) + floats * scalar(_FLOAT)
        ends, shapes = [], []
        for where, c in pairs:
            last = self._last_axis(c)
            ends.append(np.where(where & (last * _stored(c.bits) % 8 != 0), last, 0))
            shape = c.rows + 1e6 * c.columns + 1e12 * c.kernel
            shapes.append(np.where(where & self._is_conv, shape, 0))
        all_ends = np.concatenate(ends, axis=1)
        total = total + (all_ends > 0).any(1) * 2 * scalar(8)
        total = total + _of_distinct(all_ends, np.where(all_ends > 0, scalar(8), 0))
        all_shapes = np.concatenate(shapes, axis=1)
        sizes = np.tile(tensor(SHORT, [self._axes + 2], 8 * (self._axes + 2)), len(cells))
        return np.asarray(total + _of_distinct(all_shapes, np.where(all_shapes > 0, sizes, 0)))

    def _last_axis(self, cells: Cells) -> Floats:
        """Elements of the axis along which integers are packed."""
        turned = ~(self._is_gemm & cells.has_bias) & ~cells.is_table
        flat = np.where(turned, cells.rows, cells.columns)
        return np.where(self._is_conv, cells.rows * cells.columns * cells.kernel, flat)

    def _unpacking_nodes(self, size: int) -> Floats:
        """Nodes that unpack a weight whose name has as many letters as its layer's, without its slice."""
        name = self._letters
        planes = 8 // size
        conv = np.where(self._is_conv, node("Reshape", [SHORT] * 3), 0)
        sign = _MUL if size == 1 else 0
        return np.asarray(
            node("BitwiseAnd", [name, SHORT, SHORT])
            + (planes - 1)
            * (
                node("BitShift", [name, SHORT, SHORT], attribute("direction", "RIGHT"))
                + node("BitwiseAnd", [SHORT] * 3)
            )
            + node("Concat", [SHORT] * (planes + 1), attribute("axis", -1))
            + conv
            + node("Cast", [SHORT, SHORT], _TO_FLOAT)
            + sign
            + node("Sub", [SHORT] * 3)
        )


def _stored(bits: Floats) -> Floats:
    """Bits that each integer takes in the file: those of 3 bits are stored in 4."""
    return np.where(bits == 3, 4.0, bits)


def _of_distinct(keys: Floats, sizes: Floats) -> Floats:
    """Sum over each row of the sizes of its distinct keys above 0."""
    order = np.argsort(keys, axis=1)
    keys = np.take_along_axis(keys, order, axis=1)
    is_new = np.ones(keys.shape, bool)
    is_new[:, 1:] = keys[:, 1:] != keys[:, :-1]
    found = np.take_along_axis(np.broadcast_to(sizes, keys.shape), order, axis=1)
    return np.asarray(np.where(is_new & (keys > 0), found, 0).sum(1))


def _usual_operator(layer: LayerSpec) -> str:
    """The operator that a layer has in files that were not looked at."""
    return {"conv": "Conv", "depthwise_conv": "Conv", "embedding": "Gather", "linear": "MatMul"}.get(layer.kind, "")


def _conv_attributes(layer: LayerSpec) -> int:
    axes = max(0, len(layer.weight_shape) - 2)
    group = layer.weight_shape[0] if layer.kind == "depthwise_conv" else 1
    sizes = [attribute(name, [1] * axes) for name in ("dilations", "kernel_shape", "strides")]
    return sum(sizes) + attribute("pads", [0] * 2 * axes) + attribute("group", group)


def _recurrent(layer: LayerSpec, place: LayerPlace | None) -> float:
    """Bytes of a recurrent layer of 8 bits beside one for each parameter: biases stay in floating point."""
    if layer.kind != "recurrent":
        return 0.0
    place = place or LayerPlace("GRU")
    rows = layer.weight_shape[0]
    name = len(layer.name) + len(".weight10_1_q")
    biases = 2 * rows * (_FLOAT - 1)
    if place.operator == "LSTM":
        domain = "com.microsoft"
        inputs = 2 * (name - SHORT) + entry(0) + 4 * entry(SHORT) + entry(len(domain)) + len("DynamicQuantize")
        scales = 2 * tensor(SHORT, [1, rows], rows * _FLOAT)
        once = tensor(SHORT, [1, rows], rows) + entry(entry(len(domain)) + 1 + varint(1))
        return float(place.nodes * (inputs + scales + 2 * (name - SHORT) + biases) + once)
    unfolding = node("Cast", [name, SHORT], _TO_FLOAT) + _MUL + tensor(SHORT, [1, rows, 1], rows * _FLOAT)
    return float(place.nodes * (2 * (unfolding + name - SHORT) + biases))
