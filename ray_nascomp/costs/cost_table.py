"""Costs of one architecture under many plans at once, as arrays over plans and layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_nascomp.costs.factor_shapes import FACTORISABLE_KINDS
from ray_nascomp.costs.file_layout import FileLayout
from ray_nascomp.costs.file_model import FileModel
from ray_nascomp.costs.weight_forms import Cells
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.quantizers import EMBEDDING_BITS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class LayerTable:
    """Costs of every layer, each an array of shape `(plans, layers)`.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates of one sample.
        bitops: Multiply-accumulates times bits of weights and of activations.
        bytes: Bytes that it takes in the exported file: parameters, scales, and the nodes that read them.
        shared: Bytes of what layers share there, shape `(plans,)`.
    """

    params: Floats
    macs: Floats
    bitops: Floats
    bytes: Floats
    shared: Floats


class CostTable:
    """The arithmetic of an architecture's costs.

    Args:
        spec: The architecture before channels are removed.
        layout: The exported file of the task's own model, where it was looked at.
        rest: Bytes of the architecture's own file beside its layers, where they were measured.
    """

    def __init__(self, spec: ModelSpec, layout: FileLayout | None = None, rest: float | None = None) -> None:
        self.spec = spec
        self._files = FileModel(spec, layout or FileLayout())
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
        # A normalisation and a table have what they pass on in their only or second dimension, a depthwise
        # convolution of several groups in its first.
        self._passes_on = one_dimensional | (kinds == "depthwise_conv")
        self._out = np.array([shape[0] if shape else 0 for shape in shapes], float)
        self._in = np.array([shape[1] if len(shape) > 1 else 1 for shape in shapes], float)
        self._kernel = np.array([math.prod(shape[2:]) for shape in shapes], float)
        self._bias = np.array([layer.bias for layer in layers], float)
        self._file_bias = np.array([layer.bias or layer.name in folded for layer in layers], float)
        # The mean and the variance of a batch normalisation are no parameters, but stand in the file.
        self._file_statistics = np.where(kinds == "batch_norm", 2.0, 0.0)
        self._fixed = np.array([layer.fixed_params for layer in layers], float)
        multiplies = np.array([layer.is_compressible or layer.kind == "recurrent" for layer in layers])
        self._positions = np.array([layer.positions for layer in layers], float)
        self._in_positions = np.array([layer.in_positions for layer in layers], float)
        self._multiplies = np.where(multiplies, 1.0, 0.0)
        self._is_quantizable = np.array([layer.is_quantizable for layer in layers])
        self._matrices = np.isin(kinds, ("conv", "depthwise_conv", "linear", "embedding")).nonzero()[0]
        self._merges = np.array([layer.folds_into is not None for layer in layers])
        self._factorisable = np.array([layer.factorisable and layer.kind in FACTORISABLE_KINDS for layer in layers])
        self._is_tucker = (kinds == "conv") & (self._kernel > 1)
        self._unit_macs = np.array([group.macs_per_unit for group in spec.groups], float)
        self._units = np.array([group.width for group in spec.groups], float)
        self._rest = self._files.unknown_rest() if rest is None else rest

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
        quantized = self._is_quantizable & (bits < 32)
        # The second factor of an embedding is a linear layer.
        mapped = low & self._is_embedding
        beside_weights = out * (self._file_bias + self._file_statistics)
        file = np.where(self._merges, 0, (weights + self._fixed + beside_weights) * _FLOAT_BYTES)
        small = weights + self._fixed + self._files.recurrent()
        file = np.where(self._is_recurrent & quantized, small, file)
        sides = np.where(low, rank_out, out), np.where(low, rank_in, inputs)
        cells = self._cells(low, (has_in, has_out), sides, (out, inputs, ranks), bits, wanted)
        of_matrices = sum(self._files.layers(cell, low[:, self._matrices]) for cell in cells)
        file[:, self._matrices] = of_matrices
        bits = np.where(mapped, wanted, bits)
        operations = np.where(quantized, bits * np.where(bits == 8, 8, 32), 32**2)
        return LayerTable(params, macs, macs * operations, file, self._files.shared(cells))

    def _cells(
        self,
        low: NDArray[np.bool_],
        factors: tuple[NDArray[np.bool_], NDArray[np.bool_]],
        core: tuple[Floats, Floats],
        sides: tuple[Floats, Floats, Floats],
        bits: Floats,
        wanted: Floats,
    ) -> list[Cells]:
        """What stands in the file for convolutions, linear layers and embeddings."""
        chosen = self._matrices
        low, has_in, has_out = (
            low[:, chosen],
            low[:, chosen] & factors[0][:, chosen],
            low[:, chosen] & factors[1][:, chosen],
        )
        rows, columns = core[0][:, chosen], core[1][:, chosen]
        bits, wanted = bits[:, chosen], wanted[:, chosen]
        is_table = self._is_embedding[chosen] & np.ones(low.shape, bool)
        has_bias = self._file_bias[chosen] > 0
        is_whole = ~(low & ~self._is_tucker[chosen])
        cells = [
            Cells(is_whole, rows, columns, self._kernel[chosen], bits, is_table, has_bias & ~has_out, ~has_in, ~has_out)
        ]
        if low.any():
            out, inputs, ranks = (side[:, chosen] for side in sides)
            one, no = np.ones(out.shape[1]), np.zeros(out.shape, bool)
            # An embedding becomes a thinner one, and a linear layer.
            table_rows = np.where(is_table, self._out[chosen], ranks)
            cells.append(Cells(has_in, table_rows, np.where(is_table, ranks, inputs), one, bits, is_table, no, ~no, no))
            last_rows, last_bits = np.where(is_table, inputs, out), np.where(is_table, wanted, bits)
            cells.append(Cells(has_out, last_rows, ranks, one, last_bits, no, has_bias & ~is_table, no, ~no))
        return cells

    def totals(self, table: LayerTable, removed: Floats) -> dict[str, Floats]:
        """Costs of the whole model, each an array of shape `(plans,)`: params, macs, bitops, size_mb."""
        outside = self.spec.extra_macs + (self._units - removed) @ self._unit_macs
        file = table.bytes.sum(1) + table.shared + self.spec.extra_params * _FLOAT_BYTES + self._rest
        return {
            "params": table.params.sum(1) + self.spec.extra_params,
            "macs": table.macs.sum(1) + outside,
            "bitops": table.bitops.sum(1) + outside * 32**2,
            "size_mb": file / 1e6,
        }

    def dense_bytes(self) -> float:
        """Bytes that layers and parameters take in the architecture's own exported file."""
        none = np.zeros((1, len(self.spec.layers)))
        removed = np.zeros((1, len(self.spec.groups)))
        table = self.layers(removed, none, self.sides(removed), none + 32)
        return float(table.bytes.sum() + table.shared.sum()) + self.spec.extra_params * _FLOAT_BYTES

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
