"""Searchers over several objectives with constraints, for any Ray Tune trainable.

All take the same first arguments: `Searcher(goal, cost_model=None, *, seed=None, ...)`.
"""

from ray.tune.search import SEARCH_ALG_IMPORT

from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.evolutionary import EvolutionarySearch

__all__ = ["EvolutionarySearch", "GoalSearcher"]

SEARCH_ALG_IMPORT["nascomp_evolutionary"] = lambda: EvolutionarySearch
