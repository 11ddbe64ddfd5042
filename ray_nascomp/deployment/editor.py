"""Changes to an ONNX graph: nodes before and after others, and nothing left over that is not read."""

from __future__ import annotations

import onnx

from ray_nascomp.deployment.stored import NodeList


class GraphEditor:
    """Collects changes to a graph and carries them out at the end.

    Args:
        graph: The graph; changed by `finish`.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._before: dict[int, list[onnx.NodeProto]] = {}
        self._after: dict[int, list[onnx.NodeProto]] = {}
        self._constants: dict[str, onnx.TensorProto] = {}

    def node(self, index: int) -> onnx.NodeProto:
        """The node at a position."""
        return self._graph.node[index]

    def before(self, index: int, added: NodeList) -> None:
        """Puts nodes in front of the one at a position."""
        self._before.setdefault(index, []).extend(added.nodes)
        self._constants.update({constant.name: constant for constant in added.constants})

    def after(self, index: int, added: NodeList) -> None:
        """Puts nodes behind the one at a position."""
        self._after.setdefault(index, []).extend(added.nodes)
        self._constants.update({constant.name: constant for constant in added.constants})

    def finish(self) -> None:
        """Puts the new nodes in place; removes initializers and nodes that nothing reads."""
        nodes: list[onnx.NodeProto] = []
        for index, node in enumerate(self._graph.node):
            nodes += [*self._before.get(index, []), node, *self._after.get(index, [])]
        outputs = {output.name for output in self._graph.output}
        while True:
            read = {name for node in nodes for name in node.input} | outputs
            alive = [node for node in nodes if any(name in read for name in node.output)]
            if len(alive) == len(nodes):
                break
            nodes = alive
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        kept = [constant for constant in (*self._graph.initializer, *self._constants.values()) if constant.name in read]
        copied = [onnx.TensorProto.FromString(constant.SerializeToString()) for constant in kept]
        del self._graph.node[:]
        del self._graph.initializer[:]
        del self._graph.value_info[:]
        self._graph.node.extend(copies)
        self._graph.initializer.extend(copied)
