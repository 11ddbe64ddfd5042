from __future__ import annotations

import numpy as np
import pytest

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.searchers import EvolutionarySearch
from ray_nascomp.searchers.survival import nsga2, nsga3


def cloud(objectives, n=200):
    """Points of a sphere's front, most of them crowded in one corner, and worse copies behind."""
    rng = np.random.default_rng(0)
    directions = np.abs(rng.standard_normal((n, objectives))) ** 3
    front = 1 - directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return np.vstack([front, front + 0.5])


@pytest.mark.parametrize("survive", [nsga2, nsga3])
def test_the_dominated_and_the_infeasible_go_first(survive):
    losses = cloud(3)
    violations = np.zeros(400)
    violations[:50] = 1.0
    kept = survive(losses, violations, 40)
    assert len(set(kept.tolist())) == 40
    assert (kept >= 50).all()
    assert (kept < 200).all()
    losses[100] = np.nan
    assert 100 not in survive(losses, violations, 399)[:380]


def test_directions_spread_four_objectives_more_evenly_than_crowding_does():
    losses = cloud(4)

    def farthest(kept):
        """How far the worst served of all directions is from its nearest survivor, in radians."""
        rng = np.random.default_rng(1)
        wanted = rng.dirichlet(np.ones(4), 300)
        unit = 1 - losses[kept]
        cosine = (wanted / np.linalg.norm(wanted, axis=1, keepdims=True)) @ (
            unit / np.linalg.norm(unit, axis=1)[:, None]
        ).T
        return np.arccos(np.clip(cosine, -1, 1)).min(axis=1).mean()

    violations = np.zeros(len(losses))
    assert farthest(nsga3(losses, violations, 35)) < farthest(nsga2(losses, violations, 35))


def test_few_results_all_survive_in_order():
    losses = np.array([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5]])
    for survive in (nsga2, nsga3):
        assert survive(losses, np.zeros(3), 10).tolist() == [1, 2, 0]


def test_an_unknown_survival_is_named():
    with pytest.raises(ConfigError, match=r"survival.*nsga4.*nsga2"):
        EvolutionarySearch(nc.Goal([nc.Objective("a")]), survival="nsga4")
