"""Who stays in a population: constrained non-dominated rank, then how evenly the front is covered.

NSGA-II (Deb et al. 2002) prefers what has room on both sides in each objective; NSGA-III (Deb and
Jain 2014) what is nearest to one of many evenly spread directions, which holds with four objectives
and more, where almost everything is non-dominated.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb

import numpy as np

from ray_nascomp.pareto import best_first, ranks


def nsga2(losses: np.ndarray, violations: np.ndarray, count: int) -> np.ndarray:
    """Positions of the best rows, best first.

    Args:
        losses: Losses, shape `(n, objectives)`; rows with NaN come last.
        violations: Violations of the constraints, shape `(n,)`.
        count: How many stay.
    """
    rank = ranks(losses, violations)
    # Of a long search most results rank below all that stay.
    near = np.flatnonzero(rank <= np.sort(rank)[:count][-1])
    return np.asarray(near[best_first(losses[near], violations[near])][:count])


def nsga3(losses: np.ndarray, violations: np.ndarray, count: int) -> np.ndarray:
    """As `nsga2`, by directions; needs the extra `ray-nascomp[nsga3]`."""
    from pymoo.algorithms.moo.nsga3 import (
        HyperplaneNormalization,
        associate_to_niches,
        calc_niche_count,
        niching,
    )

    rank = ranks(losses, violations)
    order = np.argsort(rank, kind="stable")
    feasible = (violations == 0) & np.isfinite(losses).all(axis=1)
    if len(order) <= count or losses.shape[1] < 2 or feasible.sum() <= count:
        return order[:count]
    cut = rank[order[count - 1]]
    before, last = np.flatnonzero(rank < cut), np.flatnonzero(rank == cut)
    directions = _directions(losses.shape[1], count)
    considered = losses[np.concatenate([before, last])]
    scale = HyperplaneNormalization(losses.shape[1])
    scale.update(losses[feasible], nds=np.flatnonzero(rank[feasible] == 0))
    niche, distance, _ = associate_to_niches(considered, directions, scale.ideal_point, scale.nadir_point)
    taken = calc_niche_count(len(directions), niche[: len(before)])
    # Ties are broken alike at each call: what the population is follows from the observations.
    picked = niching(
        last,
        count - len(before),
        taken,
        niche[len(before) :],
        distance[len(before) :],
        random_state=np.random.default_rng(0),
    )
    return np.concatenate([before[np.argsort(rank[before], kind="stable")], last[picked]])


@lru_cache(maxsize=8)
def _directions(objectives: int, count: int) -> np.ndarray:
    """At most `count` evenly spread directions (Das and Dennis 1998), shape `(directions, objectives)`."""
    from pymoo.util.ref_dirs import get_reference_directions

    partitions = 1
    while comb(partitions + objectives, objectives - 1) <= count:
        partitions += 1
    return np.asarray(get_reference_directions("das-dennis", objectives, n_partitions=partitions))
