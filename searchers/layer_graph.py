"""The graph that a predictor sees: a node a layer with its dimensions, one a dimension that is for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_nascomp.model_spec import LayerSpec, ModelSpec
from ray_nascomp.space import Dimension, Role, Space


@dataclass(frozen=True)
class LayerGraph:
    """Nodes and how they are connected.

    Attributes:
        nodes: For each node the positions of its dimensions in the space.
        adjacency: Shape `(nodes, nodes)`, symmetric, rows add up to 1.
    """

    nodes: tuple[tuple[int, ...], ...]
    adjacency: np.ndarray

    @classmethod
    def of(cls, space: Space, spec: ModelSpec | None) -> LayerGraph:
        """The graph of a space over a model; without a model's spec each dimension is a node, and all are connected.

        A group's sparsity is a feature of every layer whose outputs it removes. Layers are connected
        where one reads the other's outputs, and to the next one in the model's order.
        """
        layers = [] if spec is None else [layer for layer in spec.layers if layer.kind not in ("norm", "batch_norm")]
        found = []
        for layer in layers:
            own = tuple(i for i, d in enumerate(space.dimensions) if d.target and d.target == _owner(layer, d.role))
            if own:
                found.append((layer, own))
        placed = {index for _, own in found for index in own}
        settings = [(index,) for index in range(len(space)) if index not in placed]
        nodes = (*(own for _, own in found), *settings)
        near = np.eye(len(nodes), dtype=bool)
        near[len(found) :] = near[:, len(found) :] = True
        for one, (layer, _) in enumerate(found):
            for other, (reader, _) in enumerate(found):
                reads = layer.out_group is not None and layer.out_group in dict(reader.in_groups)
                if reads or other == one + 1:
                    near[one, other] = near[other, one] = True
        return cls(nodes, near / near.sum(axis=1, keepdims=True))

    def features(self, space: Space, encoded: np.ndarray) -> np.ndarray:
        """Encoded configs `(n, dimensions)` as node features, shape `(n, nodes, width)`, padded with zeros."""
        columns = [_columns(d, encoded[:, i]) for i, d in enumerate(space.dimensions)]
        blocks = [np.concatenate([columns[i] for i in own], axis=1) for own in self.nodes]
        width = max(block.shape[1] for block in blocks)
        return np.stack([np.pad(block, ((0, 0), (0, width - block.shape[1]))) for block in blocks], axis=1)


def _owner(layer: LayerSpec, role: Role) -> str | None:
    """What a layer's value of a role is called in configs: a sparsity is its group's, all else its own."""
    return layer.out_group if role is Role.SPARSITY else layer.config_name


def _columns(dimension: Dimension, column: np.ndarray) -> np.ndarray:
    """One dimension's values, centred and squared for an ordered one, one-hot for another, shape `(n, width)`."""
    count = len(dimension.categories)
    if dimension.is_ordinal or count < 3:
        centred = 2 * column[:, None] - 1
        return np.concatenate([centred, centred**2], axis=1)
    return np.asarray(np.eye(count)[np.rint(column * (count - 1)).astype(int)])
