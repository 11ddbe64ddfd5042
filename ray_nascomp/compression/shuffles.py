"""torch-pruning's dependency graph, which cannot follow shuffled channels, kept away from them."""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from torch import nn

from ray_nascomp.compression.units import PRODUCERS

_IMAGE_DIMENSIONS = 4


class CutGraph(tp.DependencyGraph):
    """torch-pruning's graph, cut where channels are shuffled, which it cannot follow.

    Attributes:
        ends: Nodes whose outputs it does not follow.
    """

    def _trace(self, *arguments: Any, **keywords: Any) -> dict[nn.Module, Any]:
        nodes: dict[nn.Module, Any] = super()._trace(*arguments, **keywords)
        self.ends: set[Any] = set()
        beyond = [follower for node in nodes.values() if _is_shuffle(node) for follower in node.outputs]
        for node in beyond:
            self._cut_before(node)
        # What meets channels in unknown places cannot be followed any further either.
        while beyond:
            node = beyond.pop()
            if len(node.inputs) > 1:
                self._cut_before(node)
            if not isinstance(node.module, PRODUCERS):
                beyond.extend(follower for follower in node.outputs if node in follower.inputs)
        return nodes

    def _cut_before(self, node: Any) -> None:
        for source in node.inputs:
            source.outputs.remove(node)
        self.ends.update(node.inputs)
        node.inputs = []


def _is_shuffle(node: Any) -> bool:
    """Whether a node reshapes images across channels that are then permuted and reshaped again."""
    before = _sizes_before(node)
    if len(before) != _IMAGE_DIMENSIONS:
        return False
    permutations = []
    while len(node.outputs) == 1 and node.outputs[0].type == tp.ops.OPTYPE.ELEMENTWISE:
        (node,) = node.outputs
        if len(node.inputs) > 1:
            return False
        permutations.append(node.grad_fn)
    permuted = _sizes_before(node.outputs[0]) if len(node.outputs) == 1 else []
    if not permuted:
        return False
    reshaped = permuted
    for function in reversed(permutations):
        reshaped = _before_permutation(function, reshaped)
    if reshaped == permuted:
        return False
    reshaped = [size for size in reshaped if size > 1]
    keeps_channels = reshaped[:2] == before[:2]
    keeps_last_channels = reshaped[-1:] == before[-1:] and reshaped[-2:] != before[-2:]
    return reshaped != before and not keeps_channels and not keeps_last_channels


def _sizes_before(node: Any) -> list[int]:
    """The shape of what a node reshapes; empty for other nodes."""
    if node.type != tp.ops.OPTYPE.RESHAPE:
        return []
    return [int(size) for size in getattr(node.grad_fn, "_saved_self_sym_sizes", ())]


def _before_permutation(function: Any, sizes: list[int]) -> list[int]:
    """A shape before its dimensions were permuted; itself where a function permutes none."""
    before = list(sizes)
    count = len(sizes)
    if function.name() == "PermuteBackward0" and len(function._saved_dims) == count:
        for size, source in zip(sizes, function._saved_dims, strict=True):
            before[_wrapped(source, count)] = size
    elif function.name() == "TransposeBackward0":
        one, other = _wrapped(function._saved_dim0, count), _wrapped(function._saved_dim1, count)
        before[one], before[other] = sizes[other], sizes[one]
    return before


def _wrapped(dimension: int, count: int) -> int:
    # Negative dimensions are saved as unsigned integers.
    return (dimension - 2**64 if dimension >= 2**63 else dimension) % count
