from __future__ import annotations

from ray_nascomp.searchers import BayesianSearch, EvolutionarySearch, GNNPredictorSearch, HybridSearch
from ray_nascomp.testing.searchers import SearcherConformance


class TestEvolutionarySearch(SearcherConformance):
    def make(self, goal, cost_model=None, **options):
        return EvolutionarySearch(goal, cost_model, **options)


class TestBayesianSearch(SearcherConformance):
    def make(self, goal, cost_model=None, **options):
        return BayesianSearch(goal, cost_model, **options)


class TestGNNPredictorSearch(SearcherConformance):
    def make(self, goal, cost_model=None, **options):
        return GNNPredictorSearch(goal, cost_model, **options)


class TestHybridSearch(SearcherConformance):
    def make(self, goal, cost_model=None, **options):
        return HybridSearch(goal, cost_model, **options)
