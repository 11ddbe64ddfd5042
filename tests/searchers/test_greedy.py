from __future__ import annotations

import numpy as np
import pytest

from ray_nascomp.errors import ConfigError
from ray_nascomp.searchers import GreedySearch
from ray_nascomp.testing.problems import mixed
from ray_nascomp.testing.searchers import SearcherConformance, run_search

PROBLEM = mixed()


class TestGreedySearch(SearcherConformance):
    def make(self, goal, cost_model=None, **options):
        return GreedySearch(goal, cost_model, metric=goal.objectives[1].metric, **options)


def test_after_dense_and_a_ladder_each_step_costs_less_than_the_incumbent():
    results = run_search(GreedySearch(PROBLEM.goal, PROBLEM.known, metric="size", seed=0), PROBLEM, 20)
    sizes = [metrics["size"] for _, metrics in results]
    assert sizes[0] == pytest.approx(1.0)
    assert set(results[0][0]["prune"]["sparsity"].values()) == {0.0}
    assert max(sizes[1:]) < 1.0
    changed = [sum(a != b for a, b in zip(flat(results[0][0]), flat(c), strict=True)) for c, _ in results[1:]]
    assert min(changed[:8]) > 5
    assert changed[8:18] == [1] * 10


def test_it_finds_what_keeps_accuracy_at_a_given_size():
    found = run_search(GreedySearch(PROBLEM.goal, PROBLEM.known, metric="size", seed=0), PROBLEM, 120)
    small = [m["accuracy"] for _, m in found if m["size"] <= 0.6]
    rng = np.random.default_rng(0)
    from ray_nascomp.space import Space

    random = [PROBLEM.evaluate(Space(PROBLEM.space).sample(rng)) for _ in range(120)]
    lr = found[0][1]["accuracy"]
    assert max(small) > 0.85 * lr
    assert max(small) > max(m["accuracy"] for m in random if m["size"] <= 0.6)


def flat(config):
    return [*config["prune"]["sparsity"].values(), *config["quantize"]["bits"].values()]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"metric": "size", "reduction": 1.5}, "reduction: 1.5"), ({"metric": "weight"}, "'weight' is unknown")],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(ConfigError, match=says):
        run_search(GreedySearch(PROBLEM.goal, PROBLEM.known, **options), PROBLEM, 1)


def test_a_cost_model_is_needed():
    with pytest.raises(ConfigError, match="cost_model: None"):
        GreedySearch(PROBLEM.goal, metric="size")


def test_a_prior_spares_the_candidates_that_lose_most():
    def loses(config):
        return sum(config["prune"]["sparsity"].values())

    plain, led = (
        run_search(GreedySearch(PROBLEM.goal, PROBLEM.known, metric="size", seed=0, prior=prior), PROBLEM, 28)
        for prior in (None, loses)
    )
    first = [[loses(config) for config, _ in results[9:12]] for results in (plain, led)]
    assert max(first[1]) <= max(first[0])
    assert sum(loses(config) for config, _ in led) < sum(loses(config) for config, _ in plain)
