from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune

import ray_nascomp as nc
from ray_nascomp.searchers import BayesianSearch, EvolutionarySearch, RLControllerSearch
from ray_nascomp.searchers.ladder import costs_by_role, dense, rungs
from ray_nascomp.space import Space, bits, sparsity

SPACE = {
    "prune": {"sparsity": {f"layer{i}": sparsity(0.0, 0.8, 0.1) for i in range(3)}},
    "quantize": {"bits": {f"layer{i}": bits([2, 4, 8]) for i in range(3)}},
    "finetune": {"lr": tune.loguniform(1e-4, 1e-1), "epochs": 2},
}
GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("size", mode="min")])


def size_of(config):
    parts = zip(config["prune"]["sparsity"].values(), config["quantize"]["bits"].values(), strict=True)
    return {"size": sum((1 - s) * b for s, b in parts)}


def costs(configs):
    return [size_of(config)["size"] for config in configs]


@pytest.mark.parametrize("of", [costs, costs_by_role(Space(SPACE))])
def test_it_begins_dense_and_goes_down_alike_everywhere(of):
    space = Space(SPACE)
    top = dense(space, of)
    found = rungs(space, of, top, [0.0, 0.5, 1.0])
    sparsities = [list(config["prune"]["sparsity"].values()) for config in found]
    assert sparsities == [pytest.approx([s] * 3) for s in (0.0, 0.4, 0.8)]
    assert [list(config["quantize"]["bits"].values()) for config in found] == [[b] * 3 for b in (8, 4, 2)]
    assert len({config["finetune"]["lr"] for config in found}) == 3
    assert [config["finetune"]["epochs"] for config in found] == [2] * 3


def test_of_blocks_that_are_kept_or_not_half_are_kept_half_way():
    space = Space({"architecture": {f"block{i}": {"keep": tune.choice([True, False])} for i in range(6)}})

    def kept(configs):
        return [sum(block["keep"] for block in config["architecture"].values()) for config in configs]

    found = rungs(space, kept, dense(space, kept), [0.0, 0.5, 1.0])
    assert kept(found) == [6, 3, 0]
    halfway = [block["keep"] for block in found[1]["architecture"].values()]
    assert any(halfway[:3])
    assert any(halfway[3:])


@settings(max_examples=30, deadline=None)
@given(limit=st.floats(0.5, 24.0))
def test_what_cannot_be_carried_out_is_no_rung(limit):
    def bounded(configs):
        return [cost if cost <= limit else math.inf for cost in costs(configs)]

    space = Space(SPACE)
    top = dense(space, bounded)
    if top is None:
        assert limit < 12
        return
    found = rungs(space, bounded, top, np.linspace(0, 1, 5))
    assert all(cost <= limit for cost in costs(found))
    assert sorted(costs(found), reverse=True) == costs(found)


@pytest.mark.parametrize("make", [EvolutionarySearch, BayesianSearch, RLControllerSearch])
@pytest.mark.parametrize("cost_model", [None, size_of])
def test_searches_begin_with_it(make, cost_model):
    searcher = make(GOAL, cost_model, seed=0)
    searcher.set_search_properties(None, None, SPACE)
    first = [searcher.suggest(str(number)) for number in range(4)]
    assert [{*config["prune"]["sparsity"].values()} for config in first] == [{0.0}, {0.4}, {0.2}, {0.6}]


def test_a_space_without_anything_to_compress_begins_at_random():
    searcher = EvolutionarySearch(GOAL, seed=0)
    searcher.set_search_properties(
        None, None, {"lr": tune.loguniform(1e-4, 1e-1), "act": tune.choice(["relu", "gelu"])}
    )
    first = [searcher.suggest(str(number)) for number in range(4)]
    assert len({config["lr"] for config in first}) == 4
