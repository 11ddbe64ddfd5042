"""One layer's integers after the other, written into an ONNX graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from ray_nascomp.costs.file_layout import block_size
from ray_nascomp.deployment.blocks import block_product, pack_blocks
from ray_nascomp.deployment.editor import GraphEditor
from ray_nascomp.deployment.gates import SIGMOID_SCALE, Gate, product_scale
from ray_nascomp.deployment.layer_nodes import LayerNode
from ray_nascomp.deployment.readers import Readers
from ray_nascomp.deployment.stored import NodeList, stored_bits, unfold, unfold_rows
from ray_nascomp.nni_adapter.output_forms import HARD_SLOPE, hard_steps
from ray_nascomp.nni_adapter.scales import ActivationScale, LayerScales

_ROUNDING = 1e-5


class QuantizationWriter:
    """Rewrites one layer's node after the other; each tensor is quantized and each weight stored once.

    Args:
        editor: Takes the changes.
        readers: Which quantized layers read what.
        owners: Layer -> the one under whose name its integers are stored.
        tables: Layers whose rows are looked up.
        clip_limits: Tensor -> the largest value that the Clip which makes it lets through.
    """

    def __init__(
        self,
        editor: GraphEditor,
        readers: Readers,
        owners: Mapping[str, str],
        tables: Collection[str],
        clip_limits: Mapping[str, float],
    ) -> None:
        self.editor = editor
        self._readers = readers
        self._joins: dict[int, tuple[str, ActivationScale]] = {}
        self._clip_limits = clip_limits
        self._owners = owners
        self._tables = {owners[layer] for layer in tables}
        self._weights: dict[tuple[str, bool, bool], str] = {}
        self._quantized: dict[tuple[str, float, int], str] = {}
        self._integers: dict[int, str] = {}
        self._count = 0

    def write_bias(self, entry: LayerNode, bias: np.ndarray, scales: LayerScales) -> None:
        """Makes a bias whole multiples of the scales' product: with another one a Gemm stays in floating point."""
        assert scales.input is not None
        steps = (scales.weight * scales.input.scale).astype(np.float32)
        added = NodeList(f"{entry.layer}.bias", f"{entry.layer}.bias{entry.index}")
        integers = added.constant("q", np.round(bias / steps).astype(np.int32))
        entry.node.input[2] = added.node("DequantizeLinear", [integers, added.constant("s", steps)], axis=0)
        self.editor.before(entry.index, added)

    def write(self, entry: LayerNode, weight: np.ndarray, scales: LayerScales) -> None:
        """Makes a layer's integers real."""
        if entry.node.op_type == "Gather":
            self._write_lookup(entry, weight, scales)
            return
        if self._is_in_blocks(entry, weight, scales):
            self._write_blocks(entry, weight, scales)
            return
        name = self._weight(entry, weight, scales)
        entry.node.input[list(entry.node.input).index(entry.weight)] = name
        if scales.input is not None:
            entry.node.input[0] = self._activation(entry.node.input[0], scales.input, entry.index)

    def write_output(self, index: int, scale: ActivationScale) -> None:
        """Quantizes and dequantizes what a node makes."""
        node = self.editor.node(index)
        output = node.output[0]
        raw = node.output[0] = f"{output}_raw"
        pair = self._pair(raw, scale)
        pair.nodes[-1].output[0] = output
        self._integers[index] = pair.nodes[0].output[0]
        self.editor.after(index, pair)

    def write_gate(self, gate: Gate, scale: ActivationScale) -> None:
        """Makes a sigmoid behind a convolution, and its product with its input, compute in integers if they can.

        Args:
            gate: The sigmoid; the convolution has been written.
            scale: Of the convolution's output.
        """
        if not gate.is_hard:
            self.write_output(gate.index, SIGMOID_SCALE)
        elif (steps := hard_steps(scale)) is not None:
            self._write_hard_sigmoid(gate, scale, steps)
        else:
            return
        if gate.product is not None:
            self.write_output(gate.product, product_scale(scale, gate.is_hard))

    def _write_hard_sigmoid(self, gate: Gate, scale: ActivationScale, steps: int) -> None:
        node = self.editor.node(gate.index)
        added = NodeList(f"h{gate.index}", f"h{gate.index}")
        lowest, highest = scale.zero_point - steps, min(255, scale.zero_point + steps)
        zero = added.constant("z", np.array(lowest, np.uint8))
        limits = [zero, added.constant("m", np.array(highest, np.uint8))]
        factor = added.constant("s", np.array(scale.scale / HARD_SLOPE, np.float32))
        clipped = added.node("Clip", [self._integers[gate.layer], *limits])
        operator, inputs = "DequantizeLinear", [clipped, factor, zero]
        if gate.operator == "HardSwish":
            operator, inputs = "Mul", [node.input[0], added.node(operator, inputs)]
        node.CopyFrom(helper.make_node(operator, inputs, list(node.output), name=node.name))
        self.editor.before(gate.index, added)

    def _write_lookup(self, entry: LayerNode, weight: np.ndarray, scales: LayerScales) -> None:
        owner = self._owners[entry.layer]
        added = NodeList(f"{owner}.weight", f"{owner}.rows{entry.index}")
        indices, output = entry.node.input[1], entry.node.output[0]
        values = unfold_rows(added, scales.integers(weight), scales.bits, indices)
        factors = added.node("Gather", [added.constant("s_rows", scales.weight[:, None]), indices], axis=0)
        added.node("Mul", [values, factors])
        added.nodes[-1].output[0] = output
        entry.node.output[0] = f"{output}_replaced"
        self.editor.before(entry.index, added)

    def _is_in_blocks(self, entry: LayerNode, weight: np.ndarray, scales: LayerScales) -> bool:
        is_product = entry.node.op_type == "MatMul" and entry.transposed and weight.ndim == 2
        is_packed = scales.input is None and stored_bits("linear", scales.bits) == 4
        return is_product and is_packed and entry.layer not in self._tables and block_size(weight.shape[1]) is not None

    def _write_blocks(self, entry: LayerNode, weight: np.ndarray, scales: LayerScales) -> None:
        owner = self._owners[entry.layer]
        size = block_size(weight.shape[1])
        assert size is not None
        added = NodeList(f"{owner}.weightb", f"{owner}.blocks{entry.index}")
        packed = pack_blocks(scales.integers(weight), size)
        stored = added.constant("q", packed)
        factors = added.constant("s", np.repeat(scales.weight, packed.shape[1]))
        entry.node.CopyFrom(block_product(entry.node, stored, factors, weight.shape, size))
        self.editor.before(entry.index, added)

    def _weight(self, entry: LayerNode, weight: np.ndarray, scales: LayerScales) -> str:
        """Name of the dequantized weight, laid out as the node reads it."""
        owner = self._owners[entry.layer]
        key = (owner, entry.transposed, scales.input is not None)
        if key in self._weights:
            return self._weights[key]
        integers = scales.integers(weight)
        axis = weight.ndim - 1 if entry.transposed else 0
        is_table = owner in self._tables
        turned = entry.transposed and not is_table
        added = NodeList(f"{owner}.weight{'t' if turned else ''}", f"{owner}.weight{entry.index}")
        data_type = onnx.TensorProto.FLOAT if scales.input is None else onnx.TensorProto.INT8
        name = unfold(added, integers.T if turned else integers, scales.bits, data_type)
        if entry.transposed and is_table:
            name = added.node("Transpose", [name], perm=[1, 0])
        if scales.input is None:
            shape = [1] * weight.ndim
            shape[axis] = -1
            name = added.node("Mul", [name, added.constant(f"s{axis}", scales.weight.reshape(shape))])
        else:
            zeros = added.constant("z", np.zeros(len(scales.weight), np.int8))
            name = added.node("DequantizeLinear", [name, added.constant("s", scales.weight), zeros], axis=axis)
        self.editor.before(entry.index, added)
        self._weights[key] = name
        return name

    def _activation(self, tensor: str, scale: ActivationScale, index: int) -> str:
        """Name of the tensor after it has been quantized and dequantized."""
        scale = self._within_clip(tensor, scale)
        join = self._readers.join_before(tensor)
        if join is not None:
            output, scale = self._quantize_join(*join, scale)
            if output == tensor:
                return tensor
        key = (tensor, scale.scale, scale.zero_point)
        if key not in self._quantized:
            pair = self._pair(tensor, scale)
            self._quantized[key] = pair.nodes[-1].output[0]
            self.editor.before(index, pair)
        return self._quantized[key]

    def _quantize_join(self, index: int, join: onnx.NodeProto, scale: ActivationScale) -> tuple[str, ActivationScale]:
        """Has a concatenation join integers, each part quantized as the whole is; its output and the scale."""
        if index not in self._joins:
            self._joins[index] = (join.output[0], scale)
            for position, part in enumerate(list(join.input)):
                inner = self._readers.join_before(part)
                if inner is not None and self._quantize_join(*inner, scale)[0] == part:
                    continue
                pair = self._pair(part, scale)
                self.editor.before(index, pair)
                join.input[position] = pair.nodes[-1].output[0]
            self.write_output(index, scale)
        return self._joins[index]

    def _within_clip(self, tensor: str, scale: ActivationScale) -> ActivationScale:
        """The scale whose largest value is not above the limit of the Clip before; ONNX Runtime then leaves that out.

        Scales of such a tensor are above it by rounding alone, if at all.
        """
        span = 255 - scale.zero_point
        limit = self._clip_limits.get(tensor, np.inf)
        if not limit < np.float32(scale.scale) * span < limit * (1 + _ROUNDING):
            return scale
        return replace(scale, scale=float(np.nextafter(np.float32(limit / span), np.float32(0))))

    def _pair(self, tensor: str, scale: ActivationScale) -> NodeList:
        added = NodeList(f"a{self._count}", f"a{self._count}")
        self._count += 1
        parameters = [
            added.constant("s", np.array(scale.scale, np.float32)),
            added.constant("z", np.array(scale.zero_point, np.uint8)),
        ]
        quantized = added.node("QuantizeLinear", [tensor, *parameters])
        added.node("DequantizeLinear", [quantized, *parameters])
        return added
