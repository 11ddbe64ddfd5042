"""Which layers read a tensor of an exported graph."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from ray_nascomp.deployment.layer_nodes import LayerNode

# Through these ONNX Runtime moves a quantization upwards.
_TRANSPARENT_OPS = ("Relu", "Clip", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")
POSITIVE_OPS = ("Relu", "Sigmoid", "Softmax", "HardSigmoid")


class Readers:
    """The layers that read a tensor, perhaps after operators through which a quantization moves.

    ONNX Runtime joins integers of one scale. It does not move a quantization through a concatenation by
    itself, but the file can have it before each part: where all parts are positive, so that a ReLU before
    it vanishes, and where nothing but layers reads the result.

    Args:
        graph: The graph.
        layers: Its layers.
        through_joins: Whether a quantization moves through such concatenations too.
    """

    def __init__(self, graph: onnx.GraphProto, layers: Iterable[LayerNode], through_joins: bool = False) -> None:
        self._layers = {found.index: found.layer for found in layers}
        self._through_joins = through_joins
        self._outputs = {output.name for output in graph.output}
        self._users: dict[str, list[tuple[int, onnx.NodeProto]]] = {}
        self._makers: dict[str, tuple[int, onnx.NodeProto]] = {}
        for index, node in enumerate(graph.node):
            for name in node.input:
                self._users.setdefault(name, []).append((index, node))
            for name in node.output:
                self._makers[name] = (index, node)
        # Told now: parts are renamed as they are quantized.
        self._joins = {index for index, node in enumerate(graph.node) if self._joins_positive_parts(node)}

    def of(self, tensor: str) -> tuple[str, ...] | None:
        """Names of the layers; None where the graph's output or anything else reads the tensor."""
        users = self._users.get(tensor, [])
        if not users or tensor in self._outputs:
            return None
        found: list[str] = []
        for index, user in users:
            if index in self._layers and user.input[0] == tensor:
                found.append(self._layers[index])
                continue
            is_join = self._through_joins and len(users) == 1 and index in self._joins
            further = self.of(user.output[0]) if is_join or user.op_type in _TRANSPARENT_OPS else None
            if further is None:
                return None
            found += further
        return tuple(found)

    def last_alone(self, tensor: str) -> tuple[int | None, bool]:
        """The ReLUs and poolings that follow a tensor, each the only one that reads what is before.

        Returns:
            Position of the last, None where there is none, and whether a ReLU is among them.
        """
        users = self._users.get(tensor, [])
        if len(users) != 1 or users[0][1].op_type not in ("Relu", "MaxPool") or tensor in self._outputs:
            return None, False
        index, user = users[0]
        last, is_positive = self.last_alone(user.output[0])
        return index if last is None else last, is_positive or user.op_type == "Relu"

    def join_before(self, tensor: str) -> tuple[int, onnx.NodeProto] | None:
        """The concatenation, and its position, whose parts can be quantized in place of a tensor that layers read."""
        index, node = self._makers.get(tensor, (-1, onnx.NodeProto()))
        while node.op_type in _TRANSPARENT_OPS:
            tensor = node.input[0]
            index, node = self._makers.get(tensor, (-1, onnx.NodeProto()))
        return (index, node) if index in self._joins and self.of(tensor) is not None else None

    def _joins_positive_parts(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Concat" and all(map(self._is_positive, node.input))

    def _is_positive(self, tensor: str) -> bool:
        _, node = self._makers.get(tensor, (-1, onnx.NodeProto()))
        if node.op_type in POSITIVE_OPS or self._joins_positive_parts(node):
            return True
        return node.op_type in _TRANSPARENT_OPS and self._is_positive(node.input[0])
