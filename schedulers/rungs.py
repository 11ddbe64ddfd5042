"""Which results within a rung are worth going on with."""

from __future__ import annotations

import numpy as np

from ray_nascomp.pareto import ranks


def promoted(losses: np.ndarray, violations: np.ndarray, count: int) -> np.ndarray:
    """Positions of the results that are most worth going on with.

    Early in training most compressed models still break an accuracy constraint, the most
    compressed ones worst. So the bar is relative: results whose violation is at most the
    median of those that violate count as feasible for now. Among these come lower
    non-dominated ranks first; of the last rank that is not taken whole, an epsilon-net
    (Salinas et al. 2021; Schmucker et al. 2021, arXiv 2106.12639) takes those that lie far
    apart. The others follow by violation. Results with NaN come last.

    Args:
        losses: Objectives to minimise, shape `(n, m)`.
        violations: Constraint violations, shape `(n,)`, 0 for feasible results.
        count: How many to take, from 1 to n.

    Returns:
        Distinct positions, shape `(count,)`.
    """
    violations = np.where(np.isnan(losses).any(axis=1), np.inf, violations)
    violating = violations[(violations > 0) & np.isfinite(violations)]
    bar = float(np.median(violating)) if len(violating) else 0.0
    rank = ranks(losses, np.where(violations <= bar, 0.0, violations))
    last = np.partition(rank, count - 1)[count - 1]
    whole, divided = np.flatnonzero(rank < last), np.flatnonzero(rank == last)
    return np.concatenate([whole, divided[_epsilon_net(losses[divided], count - len(whole))]])


def _epsilon_net(points: np.ndarray, count: int) -> np.ndarray:
    """Positions of `count` points, each the one farthest from all before it."""
    if count == len(points) or np.isnan(points).any():
        return np.arange(count)
    span = np.ptp(points, axis=0)
    unit = points / np.where(span > 0, span, 1.0)
    order = [int(np.argmin(points[:, 0]))]
    distance = np.linalg.norm(unit - unit[order[0]], axis=1)
    while len(order) < count:
        distance[order] = -1.0
        order.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(unit - unit[order[-1]], axis=1))
    return np.array(order)
