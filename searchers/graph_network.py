"""An ensemble of graph networks that predicts metrics from node features, trained in one go.

Rounds of message passing over a fixed graph (Gilmer et al. 2017, arXiv 1704.01212), the nodes'
states added up for the prediction. The members differ in their first weights and in how much each
result counts for them (the Bayesian bootstrap, Rubin 1981): where they disagree, little is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_MEMBERS = 5
_WIDTH = 16
_ROUNDS = 2
_LEARNING_RATE = 0.02
_WEIGHT_DECAY = 1e-3
_BATCH = 64


class GraphEnsemble:
    """Graph networks over one graph.

    Args:
        adjacency: Shape `(nodes, nodes)`, rows add up to 1.
        width: Features of a node.
        extra: Features of the whole graph, such as known costs.
        metrics: Number of predicted metrics.
        rng: Source of the first weights.
    """

    def __init__(self, adjacency: np.ndarray, width: int, extra: int, metrics: int, rng: np.random.Generator) -> None:
        nodes = len(adjacency)
        shapes: dict[str, tuple[int, ...]] = {"encode": (nodes, width, _WIDTH), "node": (nodes, 1, _WIDTH)}
        for step in range(_ROUNDS):
            shapes |= {f"self{step}": (_WIDTH, _WIDTH), f"message{step}": (_WIDTH, _WIDTH), f"bias{step}": (1, _WIDTH)}
        flat = nodes * width + extra
        shapes |= {"read": (_WIDTH + extra, _WIDTH), "read_bias": (1, _WIDTH)}
        shapes |= {"out": (_WIDTH, metrics), "linear": (flat, metrics), "out_bias": (1, metrics)}
        self._weights = {
            name: (rng.standard_normal((_MEMBERS, *shape)) / np.sqrt(max(1, shape[-2]))).astype(np.float32)
            for name, shape in shapes.items()
        }
        self._weights["linear"] *= 0.1
        self._adjacency = adjacency.astype(np.float32)
        self._scale = np.zeros(metrics), np.ones(metrics)

    def fit(
        self, nodes: np.ndarray, extra: np.ndarray, targets: np.ndarray, steps: int, rng: np.random.Generator
    ) -> None:
        """Trains on from the weights that there are.

        Args:
            nodes: Node features, shape `(n, nodes, width)`.
            extra: Features of the whole graph, shape `(n, extra)`.
            targets: Metrics, shape `(n, metrics)`, finite.
            steps: Steps of Adam, each on 64 of the results.
            rng: How much each result counts for each member, and which are in a batch.
        """
        import torch

        mean, deviation = targets.mean(axis=0), targets.std(axis=0)
        self._scale = mean, np.where(deviation > 1e-12, deviation, 1.0)
        goal = _tensor((targets - mean) / self._scale[1])
        counts = _tensor(rng.standard_exponential((_MEMBERS, len(targets), 1)))
        inputs = _tensor(nodes), _tensor(extra)
        weights = {name: torch.tensor(value, requires_grad=True) for name, value in self._weights.items()}
        optimizer = torch.optim.AdamW(weights.values(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for _ in range(steps):
                batch = torch.from_numpy(rng.permutation(len(targets))[:_BATCH])
                optimizer.zero_grad()
                error = (self._forward(weights, *(part[batch] for part in inputs)) - goal[batch]) ** 2
                (counts[:, batch] * error).mean().backward()
                optimizer.step()
                schedule.step()
        self._weights = {name: value.detach().numpy() for name, value in weights.items()}

    def predict(self, nodes: np.ndarray, extra: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations over the members, each of shape `(n, metrics)`."""
        import torch

        weights = {name: torch.from_numpy(value) for name, value in self._weights.items()}
        with torch.no_grad():
            members = self._forward(weights, _tensor(nodes), _tensor(extra)).double().numpy()
        mean, scale = self._scale
        return members.mean(axis=0) * scale + mean, members.std(axis=0) * scale

    def state(self) -> dict[str, Any]:
        """Weights and scales as plain values."""
        weights = {name: value.tolist() for name, value in self._weights.items()}
        return {"weights": weights, "scale": [part.tolist() for part in self._scale]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` has given."""
        self._weights = {name: np.array(value, dtype=np.float32) for name, value in state["weights"].items()}
        mean, scale = state["scale"]
        self._scale = np.array(mean), np.array(scale)

    def _forward(self, weights: Mapping[str, torch.Tensor], nodes: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """Standardised metrics, shape `(members, n, metrics)`."""
        import torch

        near = torch.from_numpy(self._adjacency)
        # Shape (members, nodes, n, width): one product a node.
        state = torch.matmul(nodes.transpose(0, 1), weights["encode"]) + weights["node"]
        for step in range(_ROUNDS):
            passed = torch.einsum("ij,ejnw->einw", near, state)
            own = torch.matmul(state, weights[f"self{step}"][:, None])
            told = torch.matmul(passed, weights[f"message{step}"][:, None])
            state = state + torch.relu(own + told + weights[f"bias{step}"][:, None])
        whole = state.mean(dim=1)
        given = extra.expand(len(whole), *extra.shape)
        hidden = torch.relu(torch.matmul(torch.cat([whole, given], dim=2), weights["read"]) + weights["read_bias"])
        flat = torch.cat([nodes.flatten(1), extra], dim=1)
        return torch.matmul(hidden, weights["out"]) + torch.matmul(flat, weights["linear"]) + weights["out_bias"]


def _tensor(values: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
