"""Searchers over several objectives with constraints, for any Ray Tune trainable.

All take the same first arguments: `Searcher(goal, cost_model=None, *, seed=None, ...)`.
"""

from ray.tune.search import SEARCH_ALG_IMPORT

from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.bayesian import BayesianSearch
from ray_nascomp.searchers.evolutionary import EvolutionarySearch
from ray_nascomp.searchers.gnn_predictor import GNNPredictorSearch
from ray_nascomp.searchers.greedy import GreedySearch
from ray_nascomp.searchers.hybrid import HybridSearch

__all__ = ["BayesianSearch", "EvolutionarySearch", "GNNPredictorSearch", "GoalSearcher", "GreedySearch", "HybridSearch"]

SEARCH_ALG_IMPORT["nascomp_evolutionary"] = lambda: EvolutionarySearch
SEARCH_ALG_IMPORT["nascomp_bayesian"] = lambda: BayesianSearch
SEARCH_ALG_IMPORT["nascomp_hybrid"] = lambda: HybridSearch
SEARCH_ALG_IMPORT["nascomp_greedy"] = lambda: GreedySearch
SEARCH_ALG_IMPORT["nascomp_gnn_predictor"] = lambda: GNNPredictorSearch
