"""Bytes of the exported file of many plans at once, from what the exporter writes for each form of a layer.

Nothing here is fitted: names, shapes, nodes and constants are counted as `ray_nascomp.deployment`
(`writer`, `stored`, `recurrent`, `compact`) writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ray_nascomp.costs.file_layout import FileLayout, LayerPlace
from ray_nascomp.costs.onnx_sizes import SHORT, attribute, entry, node, scalar, tensor, varint
from ray_nascomp.costs.weight_forms import DOMAIN, FLOAT, MUL, TO_FLOAT, Cells, WeightForms, stored_bits
from ray_nascomp.model_spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

_MATRICES = ("conv", "depthwise_conv", "linear", "embedding")
_UNKNOWN_FILE, _UNKNOWN_LAYER = 60, 120
"""Bytes beside layers of a file, and for each of its layers, where no file was measured."""
_PAIR = scalar(FLOAT) + node("QuantizeLinear", [SHORT] * 4) + node("DequantizeLinear", [SHORT] * 4)
"""An activation's scale, its quantization and its return; beside them stands a zero point."""
_CLIPPED = 2 * scalar(1) + scalar(FLOAT) + node("Clip", [SHORT] * 4)
_HARD_GATES = {
    "HardSigmoid": _CLIPPED - node("HardSigmoid", [SHORT] * 2, attribute("alpha", 1 / 6)),
    "HardSwish": _CLIPPED
    + node("DequantizeLinear", [SHORT] * 4)
    + node("Mul", [SHORT] * 3)
    - node("HardSwish", [SHORT] * 2),
}
"""What a hard sigmoid takes in integers beyond what it takes in floating point, where nothing else reads its input."""
_DOMAIN_ENTRY = entry(entry(len(DOMAIN)) + 1 + varint(1))


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
        is_conv = np.array([layer.kind in ("conv", "depthwise_conv") for layer in layers], bool)
        self._smoothed = ~is_conv & layout.is_smoothed
        self._forms = WeightForms(layers, places, self._smoothed)
        self._unknown = _UNKNOWN_FILE + _UNKNOWN_LAYER * len(spec.layers) + layout.shared_rows
        self._set_inputs(layers, places)

    def unknown_rest(self) -> float:
        """Bytes beside the layers, where no file was measured."""
        return float(self._unknown)

    def recurrent(self) -> Floats:
        """Bytes of recurrent layers of 8 bits beside one for each parameter, shape `(all layers,)`."""
        return self._recurrent

    def layers(self, cells: Cells, is_factor: Flags) -> Floats:
        """Bytes of nodes, weights and biases, shape `(plans, layers)`; see `WeightForms.bytes_of`."""
        return self._forms.bytes_of(cells, is_factor)

    def shared(self, cells: Sequence[Cells]) -> Floats:
        """Bytes of what several layers share: activations' quantization, equal constants; shape `(plans,)`."""
        integers = [c.exist & (c.bits == 8) & ~c.is_table for c in cells]
        total = np.zeros(len(cells[0].exist))
        if any(where.any() for where in integers):
            total = total + self._activations(cells, integers)
            rows = np.concatenate([np.where(w, c.rows, 0) for w, c in zip(integers, cells, strict=True)], axis=1)
            total += _of_distinct(rows, tensor(SHORT, [rows], rows))
        in_blocks = [self._forms.are_in_blocks(c) for c in cells]
        total += np.any([where.any(1) for where in in_blocks], axis=0) * _DOMAIN_ENTRY
        packed = [c.exist & (c.bits < 8) & ~blocks for c, blocks in zip(cells, in_blocks, strict=True)]
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
        self._sigmoids = np.array([place.gates.count("Sigmoid") for place in places], float)
        self._hard_gates = np.array([sum(_HARD_GATES.get(gate, 0) for gate in place.gates) for place in places])
        self._products = np.array([place.products for place in places], float)
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
        unfollowed = last * self._forms.is_conv * ~followed
        sigmoids, products = unfollowed @ self._sigmoids, unfollowed @ self._products
        biases = sum(
            np.where(where & c.is_last & ~followed, self._forms.integer_biases(c), 0).sum(1) for where, c in pairs
        )
        count = read.sum(1) + inner.sum(1) + unfollowed.sum(1) + sigmoids + products
        zeros = (read & self._is_positive).sum(1) + sigmoids
        own = count - zeros + (zeros > 0)
        total = count * _PAIR + own * scalar(1) + unfollowed @ self._hard_gates + biases
        # All sigmoids have one scale.
        total = total - np.maximum(sigmoids - 1, 0) * scalar(FLOAT)
        if self._smoothed.any():
            for where, c in pairs:
                smoothed = where & self._smoothed
                factor = np.where(smoothed, tensor(SHORT, [c.columns], c.columns * FLOAT) + MUL, 0)
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
        total = bytes_ * scalar(1) + floats * scalar(FLOAT)
        ends, shapes = [], []
        for where, c in pairs:
            last = self._forms.last_axis(c)
            ends.append(np.where(where & (last * stored_bits(c.bits) % 8 != 0), last, 0))
            shape = c.rows + 1e6 * c.columns + 1e12 * c.kernel
            shapes.append(np.where(where & self._forms.is_conv, shape, 0))
        all_ends = np.concatenate(ends, axis=1)
        total = total + (all_ends > 0).any(1) * 2 * scalar(8)
        total = total + _of_distinct(all_ends, np.where(all_ends > 0, scalar(8), 0))
        all_shapes = np.concatenate(shapes, axis=1)
        sizes = np.tile(tensor(SHORT, [self._forms.axes + 2], 8 * (self._forms.axes + 2)), len(cells))
        return np.asarray(total + _of_distinct(all_shapes, np.where(all_shapes > 0, sizes, 0)))


def _of_distinct(keys: Floats, sizes: Floats) -> Floats:
    """Sum over each row of the sizes of its distinct keys above 0."""
    order = np.argsort(keys, axis=1)
    keys = np.take_along_axis(keys, order, axis=1)
    is_new = np.ones(keys.shape, bool)
    is_new[:, 1:] = keys[:, 1:] != keys[:, :-1]
    found = np.take_along_axis(np.broadcast_to(sizes, keys.shape), order, axis=1)
    return np.asarray(np.where(is_new & (keys > 0), found, 0).sum(1))


def _recurrent(layer: LayerSpec, place: LayerPlace | None) -> float:
    """Bytes of a recurrent layer of 8 bits beside one for each parameter: biases stay in floating point."""
    if layer.kind != "recurrent":
        return 0.0
    place = place or LayerPlace("GRU")
    rows = layer.weight_shape[0]
    name = len(layer.name) + len(".weight10_1_q")
    biases = 2 * rows * (FLOAT - 1)
    if place.operator == "LSTM":
        inputs = 2 * (name - SHORT) + entry(0) + 4 * entry(SHORT) + entry(len(DOMAIN)) + len("DynamicQuantize")
        scales = 2 * tensor(SHORT, [1, rows], rows * FLOAT)
        once = tensor(SHORT, [1, rows], rows) + _DOMAIN_ENTRY
        return float(place.nodes * (inputs + scales + 2 * (name - SHORT) + biases) + once)
    unfolding = node("Cast", [name, SHORT], TO_FLOAT) + MUL + tensor(SHORT, [1, rows, 1], rows * FLOAT)
    return float(place.nodes * (2 * (unfolding + name - SHORT) + biases))


def _usual_operator(layer: LayerSpec) -> str:
    """The operator that a layer has in files that were not looked at."""
    return {"conv": "Conv", "depthwise_conv": "Conv", "embedding": "Gather", "linear": "MatMul"}.get(layer.kind, "")
