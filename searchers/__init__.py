"""Searchers over several objectives with constraints, for any Ray Tune trainable.

All take the same first arguments: `Searcher(goal, cost_model=None, *, seed=None, ...)`.
"""

from ray.tune.search import SEARCH_ALG_IMPORT

from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.bayesian import BayesianSearch
from ray_nascomp.searchers.co_optimisation import AdaptiveSearch, IterativeSearch, MultiStageSearch
from ray_nascomp.searchers.evolutionary import EvolutionarySearch
from ray_nascomp.searchers.gnn_predictor import GNNPredictorSearch
from ray_nascomp.searchers.greedy import GreedySearch
from ray_nascomp.searchers.hybrid import HybridSearch
from ray_nascomp.searchers.rl_controller import RLControllerSearch

__all__ = [
    "AdaptiveSearch",
    "BayesianSearch",
    "EvolutionarySearch",
    "GNNPredictorSearch",
    "GoalSearcher",
    "GreedySearch",
    "HybridSearch",
    "IterativeSearch",
    "MultiStageSearch",
    "RLControllerSearch",
]

SEARCH_ALG_IMPORT["nascomp_evolutionary"] = lambda: EvolutionarySearch
SEARCH_ALG_IMPORT["nascomp_bayesian"] = lambda: BayesianSearch
SEARCH_ALG_IMPORT["nascomp_hybrid"] = lambda: HybridSearch
SEARCH_ALG_IMPORT["nascomp_greedy"] = lambda: GreedySearch
SEARCH_ALG_IMPORT["nascomp_gnn_predictor"] = lambda: GNNPredictorSearch
SEARCH_ALG_IMPORT["nascomp_multi_stage"] = lambda: MultiStageSearch
SEARCH_ALG_IMPORT["nascomp_iterative"] = lambda: IterativeSearch
SEARCH_ALG_IMPORT["nascomp_adaptive"] = lambda: AdaptiveSearch
SEARCH_ALG_IMPORT["nascomp_rl_controller"] = lambda: RLControllerSearch
