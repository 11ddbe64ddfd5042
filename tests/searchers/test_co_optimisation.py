from __future__ import annotations

import numpy as np
import pytest
from ray import tune

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.searchers import AdaptiveSearch, IterativeSearch, MultiStageSearch
from ray_nascomp.space import Space
from ray_nascomp.testing.problems import Problem, mixed
from ray_nascomp.testing.searchers import SearcherConformance, run_search

BLOCKS = {"first": ["prune"], "second": ["quantize/bits", "finetune"]}


class TestMultiStageSearch(SearcherConformance):
    def make(self, goal, cost_model=None, **options):
        return MultiStageSearch(goal, cost_model, stage_trials=6, **options)


class TestIterativeSearch(SearcherConformance):
    def make(self, goal, cost_model=None, **options):
        return IterativeSearch(goal, cost_model, period=4, **options)


class TestAdaptiveSearch(SearcherConformance):
    def make(self, goal, cost_model=None, **options):
        return AdaptiveSearch(goal, cost_model, **options)


def joint() -> Problem:
    """An architecture and its compression: wide networks lose less when they are pruned."""

    def evaluate(config):
        width, depth = config["architecture"]["width"], config["architecture"]["depth"]
        sparsity, bits = config["prune"]["sparsity"], config["quantize"]["bits"]
        size = width * depth * (1 - sparsity) * bits / 32
        damage = 1 / width + 1 / depth + sparsity**3 + 0.1 * (bits == 4)
        return {"accuracy": float(np.exp(-damage)), "size": size / 64}

    space = {
        "prune": {"sparsity": nc.sparsity()},
        "architecture": {"width": tune.randint(1, 9), "depth": tune.randint(1, 9)},
        "quantize": {"bits": nc.bits([4, 8, 32])},
    }
    goal = nc.Goal([nc.Objective("accuracy"), nc.Objective("size", "min")])
    return Problem("joint", goal, space, evaluate, lambda c: {"size": evaluate(c)["size"]}, (-1.0, 0.0), (0.0, 1.0))


def compression(config):
    return config["prune"]["sparsity"], config["quantize"]["bits"]


def architecture(config):
    return tuple(config["architecture"].values())


def test_stages_search_architectures_uncompressed_and_then_compress_the_best_ones():
    problem = joint()
    results = run_search(MultiStageSearch(problem.goal, problem.known, stage_trials=20, seed=0), problem, 60)
    stage, rest = results[:20], results[20:]
    assert {compression(config) for config, _ in stage} == {(0.0, 32)}
    losses = np.array([problem.goal.losses(metrics) for _, metrics in stage])
    dominated = (losses[:, None] >= losses).all(axis=2) & (losses[:, None] > losses).any(axis=2)
    best = {architecture(config) for (config, _), bad in zip(stage, dominated.any(axis=1), strict=True) if not bad}
    assert {architecture(config) for config, _ in rest} <= best
    assert len({architecture(config) for config, _ in rest}) > 3


def test_in_turn_each_block_keeps_the_rest_of_a_result_on_the_front():
    problem = joint()
    results = run_search(IterativeSearch(problem.goal, problem.known, period=5, seed=0), problem, 40)
    seen: list = []
    for number, (config, metrics) in enumerate(results):
        front = [c for c, m in seen if not any(problem.goal.dominates(other, m) for _, other in seen)]
        held = compression if number // 5 % 2 == 0 else architecture
        assert not front or held(config) in {held(c) for c in front}
        seen.append((config, metrics))


def test_the_block_that_pays_has_most_trials():
    def evaluate(config):
        x, *rest = config["useful"].values()
        return {"loss": x**2 + sum(rest), "price": 1 - x + sum(rest)}

    space = {
        "useful": {name: tune.uniform(0, 1) for name in "xabcde"},
        "useless": {name: tune.uniform(0, 1) for name in "yz"},
    }
    goal = nc.Goal([nc.Objective("loss", "min"), nc.Objective("price", "min")])
    problem = Problem("one sided", goal, space, evaluate, None, (0.0, 0.0), (1.0, 1.0))
    shares = []
    for seed in range(5):
        searcher = AdaptiveSearch(goal, seed=seed)
        run_search(searcher, problem, 60)
        assert searcher.trials_of("useful") + searcher.trials_of("useless") == 60
        shares.append(searcher.trials_of("useful") / 60)
    assert np.mean(shares) > 0.57


@pytest.mark.parametrize("make", [MultiStageSearch, IterativeSearch, AdaptiveSearch])
def test_all_beat_random_search_of_everything_at_once(make):
    problem = mixed()
    rng = np.random.default_rng(0)
    space = Space(problem.space)
    random = [problem.hypervolume([problem.evaluate(space.sample(rng)) for _ in range(60)]) for _ in range(8)]
    found = [
        problem.hypervolume([m for _, m in run_search(make(problem.goal, problem.known, seed=s), problem, 60)])
        for s in range(5)
    ]
    assert np.mean(found) > np.mean(random) + 0.02


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ({"all": ["prune", "quantize", "finetune"]}, "blocks: all was given"),
        ({"first": ["prune"], "second": ["quantise"]}, "'quantise' is unknown"),
        ({"first": ["prune"], "second": ["quantize"]}, "finetune/lr are in none"),
    ],
)
def test_mistakes_in_blocks_are_named_before_any_trial(blocks, says):
    problem = mixed()
    searcher = IterativeSearch(problem.goal, blocks=blocks)
    with pytest.raises(ConfigError, match=says):
        searcher.set_search_properties(None, None, dict(problem.space))


def test_blocks_are_set_by_the_beginnings_of_keys():
    problem = mixed()
    searcher = IterativeSearch(problem.goal, blocks=BLOCKS)
    searcher.set_search_properties(None, None, dict(problem.space))
    assert {name: int(is_in.sum()) for name, is_in in searcher.blocks.items()} == {"first": 11, "second": 5}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda goal: MultiStageSearch(goal, stage_trials=0), "stage_trials: 0"),
        (lambda goal: IterativeSearch(goal, period=0), "period: 0"),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make(mixed().goal)
