"""Search with a graph network that predicts what a trial would tell.

As in BANANAS (White et al. 2021, arXiv 1910.11858) an ensemble is trained on all results, children
of the incumbents are bred, and the next trial is the best of them under one draw from the ensemble's
predictions (independent Thompson sampling). The network reads the model's own layer graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ray_nascomp.goals import Goal
from ray_nascomp.observations import Observation
from ray_nascomp.searchers.evolutionary import EvolutionarySearch
from ray_nascomp.searchers.graph_network import GraphEnsemble
from ray_nascomp.searchers.known_costs import CostFunction
from ray_nascomp.searchers.layer_graph import LayerGraph
from ray_nascomp.searchers.scaling import SPREAD, UnitScale, tabulated

_CHILDREN = 64
_FIRST_STEPS = 150
_STEPS = 50
# A gradient step costs by the result: a long search learns from the newest.
_LEARNT = 400


class GNNPredictorSearch(EvolutionarySearch):
    """Evolution of the incumbents, guided by an ensemble of graph networks.

    The graph is that of the layers in `cost_model.spec`, where the cost model has one as
    `ray_nascomp.CostModel` does; else each dimension is a node and all are connected.

    Args:
        goal: See `GoalSearcher`.
        cost_model: See `GoalSearcher`. What it knows is an input of the network, too.
        population_size: Number of results that parents are taken from, 4 or more.
        initial: Number of random configs before the first network, 4 or more.
        seed: See `GoalSearcher`.
        points_to_evaluate: See `GoalSearcher`.
        warm_start: See `GoalSearcher`.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(
        self,
        goal: Goal,
        cost_model: CostFunction | None = None,
        *,
        population_size: int = 32,
        initial: int = 10,
        seed: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        warm_start: Iterable[Observation] | str | Path | Any = None,
    ) -> None:
        super().__init__(
            goal,
            cost_model,
            population_size=population_size,
            initial=initial,
            seed=seed,
            points_to_evaluate=points_to_evaluate,
            warm_start=warm_start,
        )
        self._brood = _CHILDREN
        self._ensemble: GraphEnsemble | None = None
        self._fitted_at = 0

    @cached_property
    def graph(self) -> LayerGraph:
        """The graph that the network reads."""
        return LayerGraph.of(self.space, getattr(self.cost_model, "spec", None))

    def imagine(
        self,
        configs: Sequence[Mapping[str, Any]],
        known: Sequence[Mapping[str, float]],
        unknown: Sequence[str],
        draws: int,
    ) -> np.ndarray:
        """Draws from the ensemble's predictions of the unknown metrics, shape `(draws, configs, unknown)`."""
        finals = np.array(self.final_positions())
        columns = [self.goal.metrics.index(metric) for metric in unknown]
        targets = self.metric_table(finals)[:, columns]
        usable = np.flatnonzero(np.isfinite(targets).all(axis=1))[-_LEARNT:]
        costs = self.known_table(finals[usable])
        scale = UnitScale(costs)
        if self._ensemble is None or self._is_due(len(usable)):
            nodes = self.graph.features(self.space, self.table(finals[usable])[0])
            steps = _STEPS if self._ensemble else _FIRST_STEPS
            ensemble = self._ensemble or self._made(nodes.shape[2], costs.shape[1], len(columns), self.rng)
            ensemble.fit(nodes, (scale(costs) - 0.5) / SPREAD, targets[usable], steps, self.rng)
            self._ensemble, self._fitted_at = ensemble, len(self.observations)
        nodes = self.graph.features(self.space, self.space.encode(configs))
        mean, deviation = self._ensemble.predict(nodes, (scale(tabulated(known)) - 0.5) / SPREAD)
        return mean + deviation * self.rng.standard_normal((draws, *mean.shape))

    def own_state(self) -> dict[str, Any]:
        """The networks' weights: they are trained now and then only."""
        state = self._ensemble.state() if self._ensemble else None
        return {"fitted_at": self._fitted_at, "ensemble": state}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes back the networks' weights."""
        super().load_own_state(state)
        self._fitted_at, self._ensemble = state["fitted_at"], None
        if saved := state["ensemble"]:
            width = np.shape(saved["weights"]["encode"])[2]
            extra = np.shape(saved["weights"]["linear"])[1] - len(self.graph.nodes) * width
            self._ensemble = self._made(width, extra, len(saved["scale"][0]), np.random.default_rng(0))
            self._ensemble.load(saved)

    def _is_due(self, learnt: int) -> bool:
        return len(self.observations) - self._fitted_at >= max(2, learnt // 16)

    def _made(self, width: int, extra: int, metrics: int, rng: np.random.Generator) -> GraphEnsemble:
        return GraphEnsemble(self.graph.adjacency, width, extra, metrics, rng)
