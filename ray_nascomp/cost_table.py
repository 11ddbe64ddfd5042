"""Costs of one architecture under many plans at once, as arrays over plans and layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_nascomp.factor_shapes import FACTORISABLE_KINDS
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.quantizers import EMBEDDING_BITS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_FLOAT_BYTES = 4
_UNKNOWN_FILE, _UNKNOWN_LAYER = 60, 255
"""Bytes of a file and of a layer beside the parameters, where no file was measured."""
_FACTOR = {"conv": 190, "linear": 45, "embedding": 45}
"""Kind of a layer -> bytes that each further factor adds beside its parameters."""
_LETTER = 4
"""Bytes that each letter of a layer's name adds where its weight has integers."""
_CONVOLUTION = {8: 170, 4: 290, 2: 465, 1: 840}
_MATRIX = {8: 120, 4: 235, 2: 455, 1: 895}
_QUANTIZED = {
    **dict.fromkeys(("conv", "depthwise_conv"), _CONVOLUTION),
    "linear": _MATRIX,
    "embedding": {8: 290, 4: 110},
    "recurrent": {8: 345},
}
"""Kind -> bits as they are stored -> bytes that integers add to each layer or factor beside weights and scales."""


@dataclass(frozen=True)
class LayerTable:
    """Costs of every layer, each an array of shape `(plans, layers)`.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates of one sample.
        bitops: Multiply-accumulates times bits of weights and of activations.
        bytes: Bytes of the parameters in the exported file.
        overhead: Bytes that its factors and integers take there beside them.
    """

    params: Floats
    macs: Floats
    bitops: Floats
    bytes: Floats
    overhead: Floats


class CostTable:
    """The arithmetic of an architecture's costs.

    Args:
        spec: The architecture before channels are removed.
        overhead: Bytes of the architecture's own exported file beside its parameters, where they were
            measured.
    """

    def __init__(self, spec: ModelSpec, overhead: float | None = None) -> None:
        self.spec = spec
        layers = spec.layers
        group_index = {group.name: index for index, group in enumerate(spec.groups)}
        folded = {layer.folds_into for layer in layers}
        self._in_units = np.zeros((len(spec.groups), len(layers)))
        self._out_units = np.zeros((len(spec.groups), len(layers)))
        for index, layer in enumerate(layers):
            if layer.out_group is not None:
                self._out_units[group_index[layer.out_group], index] = layer.out_per_unit
            for group, count in layer.in_groups:
                self._in_units[group_index[group], index] += count
        kinds = np.array([layer.kind for layer in layers])
        shapes = [layer.weight_shape for layer in layers]
        one_dimensional = np.isin(kinds, ("batch_norm", "norm"))
        self._is_embedding = kinds == "embedding"
        self._is_recurrent = kinds == "recurrent"
        self._has_inputs = np.isin(kinds, ("conv", "linear", "embedding", "recurrent"))
        # A normalisation and a table have what they pass on in their only or second dimension.
        self._passes_on = one_dimensional
        self._out = np.array([shape[0] if shape else 0 for shape in shapes], float)
        self._in = np.array([shape[1] if len(shape) > 1 else 1 for shape in shapes], float)
        self._kernel = np.array([math.prod(shape[2:]) for shape in shapes], float)
        self._bias = np.array([layer.bias for layer in layers], float)
        self._file_bias = np.array([layer.bias or layer.name in folded for layer in layers], float)
        self._fixed = np.array([layer.fixed_params for layer in layers], float)
        multiplies = np.array([layer.is_compressible or layer.kind == "recurrent" for layer in layers])
        self._positions = np.array([layer.positions for layer in layers], float)
        self._in_positions = np.array([layer.in_positions for layer in layers], float)
        self._multiplies = np.where(multiplies, 1.0, 0.0)
        self._is_quantizable = np.array([layer.is_quantizable for layer in layers])
        self._factor = np.array([_FACTOR.get(layer.kind, 0) for layer in layers], float)
        self._integers = {
            stored: np.array(
                [_QUANTIZED.get(layer.kind, {}).get(stored, 0) + _LETTER * len(layer.name) for layer in layers], float
            )
            for stored in _MATRIX
        }
        self._merges = np.array([layer.folds_into is not None for layer in layers])
        self._factorisable = np.array([layer.factorisable and layer.kind in FACTORISABLE_KINDS for layer in layers])
        self._is_tucker = (kinds == "conv") & (self._kernel > 1)
        self._unit_macs = np.array([group.macs_per_unit for group in spec.groups], float)
        self._units = np.array([group.width for group in spec.groups], float)
        unknown = _UNKNOWN_FILE + _UNKNOWN_LAYER * float(self._is_quantizable.sum())
        self._overhead = unknown if overhead is None else overhead

    def effective_bits(self, bits: Floats) -> Floats:
        """`quantizers.bits_for` of every layer; layers without integers have 32."""
        table = np.where(bits <= EMBEDDING_BITS[0], EMBEDDING_BITS[0], np.where(bits <= 8, 8, 32))
        bits = np.where(self._is_embedding, table, bits)
        bits = np.where(self._is_recurrent & (bits < 32), 8, bits)
        return np.where(self._is_quantizable, bits, 32)

    def sides(self, removed: Floats) -> tuple[Floats, Floats]:
        """Output and input channels of every layer.

        Args:
            removed: Units removed from each group, shape `(plans, groups)`.

        Returns:
            Two arrays of shape `(plans, layers)`.
        """
        gone_in = removed @ self._in_units
        out = self._out - removed @ self._out_units - np.where(self._passes_on, gone_in, 0)
        return out, self._in - np.where(self._has_inputs, gone_in, 0)

    def ranks(self, share: Floats, round_to: NDArray[np.int64], removed: Floats) -> Floats:
        """Ranks of the layers' low-rank forms.

        Args:
            share: Share of the largest rank that saves parameters, shape `(plans, layers)`; 1
                leaves a layer as it is.
            round_to: Ranks come in multiples of this, shape `(plans,)`.
            removed: Units that are gone when the layers are factorised, shape `(plans, groups)`.

        Returns:
            Array of shape `(plans, layers)`, 0 where the layer stays as it is.
        """
        out, inputs = self.sides(removed)
        largest = self._max_useful_rank(out, inputs)
        step = np.where(largest >= round_to[:, None], round_to[:, None], 1)
        rank = np.clip(np.round(share * largest / step + 1e-9) * step, 1, largest)
        return np.where(self._factorisable & (share < 1) & (largest >= 1), rank, 0)

    def layers(
        self, removed: Floats, ranks: Floats, sides_of_ranks: tuple[Floats, Floats], wanted: Floats
    ) -> LayerTable:
        """Costs of every layer.

        Args:
            removed: Units removed from each group, shape `(plans, groups)`.
            ranks: As `ranks` gives them.
            sides_of_ranks: Output and input channels when the layers were factorised.
            wanted: Bits that the plans give, shape `(plans, layers)`.
        """
        bits = self.effective_bits(wanted)
        out, inputs = self.sides(removed)
        whole = out * inputs * self._kernel
        low = ranks > 0
        has_in = low & (~self._is_tucker | (ranks < sides_of_ranks[1]))
        has_out = low & (~self._is_tucker | (ranks < sides_of_ranks[0]))
        rank_in = np.where(self._is_tucker & ~has_in, inputs, ranks)
        rank_out = np.where(self._is_tucker & ~has_out, out, ranks)
        # A matrix has two factors: the first is counted as the one at the input, the last as that at the output.
        first = np.where(has_in, inputs * ranks, 0)
        core = np.where(low & self._is_tucker, rank_in * rank_out * self._kernel, 0)
        last = np.where(has_out, ranks * out, 0)
        table = np.where(low & self._is_embedding, self._out * ranks, 0)
        first = np.where(self._is_embedding, table, first)
        last = np.where(low & self._is_embedding, ranks * inputs, last)
        weights = np.where(low, first + core + last, whole)
        params = weights + out * self._bias + self._fixed
        in_positions = np.where(self._is_tucker, self._in_positions, self._positions)
        factor_macs = np.where(self._is_embedding, 0, first * in_positions) + (core + last) * self._positions
        macs = np.where(
            low,
            np.where(self._multiplies + self._is_embedding > 0, factor_macs, 0),
            whole * self._positions * self._multiplies,
        )
        rows = np.where(low, np.where(has_in, ranks, 0) + np.where(has_out, out, 0) + (core > 0) * rank_out, out)
        rows = np.where(low & self._is_embedding, self._out + inputs, rows)
        quantized = self._is_quantizable & (bits < 32)
        # Where the layer computes in integers, there is a zero point for each scale.
        zero_points = np.where((bits == 8) & ~self._is_embedding, rows, 0)
        packed = weights * _stored(bits) / 8 + rows * _FLOAT_BYTES + zero_points
        # The second factor of an embedding is a linear layer.
        mapped = low & self._is_embedding
        second = last * (_stored(wanted) - _stored(bits)) / 8 + np.where(wanted == 8, inputs, 0)
        packed = packed + np.where(mapped, second, 0)
        recurrent = weights + self._fixed
        # Of a recurrent layer both the weights for its inputs and those for its state have scales.
        packed = np.where(self._is_recurrent, recurrent * np.minimum(bits, 8) / 8 + 2 * out * _FLOAT_BYTES, packed)
        file = np.where(quantized, packed, (weights + self._fixed) * _FLOAT_BYTES)
        file = np.where(self._merges, 0, file + out * self._file_bias * _FLOAT_BYTES)
        nodes = np.where(low, 1.0 * has_in + has_out + (core > 0), 1.0)
        overhead = (nodes - 1) * self._factor
        for stored, constants in self._integers.items():
            matrix = np.where(_stored(wanted) == stored, _MATRIX[stored], 0)
            overhead = overhead + np.where(quantized & mapped, matrix, 0)
            count = np.where(mapped, 1, nodes)
            overhead = overhead + count * np.where(quantized & (_stored(bits) == stored), constants, 0)
        bits = np.where(mapped, wanted, bits)
        operations = np.where(quantized, bits * np.where(bits == 8, 8, 32), 32**2)
        return LayerTable(params, macs, macs * operations, file, overhead)

    def totals(self, table: LayerTable, removed: Floats) -> dict[str, Floats]:
        """Costs of the whole model, each an array of shape `(plans,)`: params, macs, bitops, size_mb."""
        outside = self.spec.extra_macs + (self._units - removed) @ self._unit_macs
        file = (table.bytes + table.overhead).sum(1) + self.spec.extra_params * _FLOAT_BYTES + self._overhead
        return {
            "params": table.params.sum(1) + self.spec.extra_params,
            "macs": table.macs.sum(1) + outside,
            "bitops": table.bitops.sum(1) + outside * 32**2,
            "size_mb": file / 1e6,
        }

    def dense_bytes(self) -> float:
        """Bytes of the parameters in the architecture's own exported file."""
        none = np.zeros((1, len(self.spec.layers)))
        removed = np.zeros((1, len(self.spec.groups)))
        table = self.layers(removed, none, self.sides(removed), none + 32)
        return float(table.bytes.sum()) + self.spec.extra_params * _FLOAT_BYTES

    def _max_useful_rank(self, out: Floats, inputs: Floats) -> Floats:
        """`factor_shapes.max_useful_rank` of every layer."""
        small, large = np.minimum(out, inputs), np.maximum(out, inputs)
        matrix = np.ceil(out * inputs / np.maximum(out + inputs, 1)) - 1
        kernel = self._kernel
        total = out + inputs
        both = np.ceil((np.sqrt(total**2 + 4 * kernel**2 * out * inputs) - total) / (2 * kernel) - 1e-9) - 1
        one = np.ceil(kernel * small * large / np.maximum(kernel * small + large, 1) - 1e-9) - 1
        tucker = np.where(one >= small, np.minimum(one, large - 1), np.minimum(both, small - 1))
        return np.maximum(0, np.where(self._is_tucker, tucker, matrix))


def _stored(bits: Floats) -> Floats:
    """Bits that each integer takes in the file: those of 3 bits are stored in 4."""
    return np.where(bits == 3, 4.0, bits)
