"""The order of results within a rung: which of them are worth going on with."""

from __future__ import annotations

import numpy as np

from ray_nascomp.pareto import ranks


def promotion_order(losses: np.ndarray, violations: np.ndarray) -> np.ndarray:
    """Positions of the results, most worth going on with first.

    Early in training most compressed models still break an accuracy constraint, the most
    compressed ones worst. So the bar is relative: results whose violation is at most the
    median of those that violate count as feasible for now. Among these come lower
    non-dominated ranks first, and within a rank an epsilon-net (Salinas et al. 2021; Schmucker
    et al. 2021, arXiv 2106.12639), which keeps those that lie far apart. The others follow by
    violation. Results with NaN come last.

    Args:
        losses: Objectives to minimise, shape `(n, m)`.
        violations: Constraint violations, shape `(n,)`, 0 for feasible results.

    Returns:
        A permutation, shape `(n,)`.
    """
    violations = np.where(np.isnan(losses).any(axis=1), np.inf, violations)
    violating = violations[(violations > 0) & np.isfinite(violations)]
    bar = float(np.median(violating)) if len(violating) else 0.0
    relaxed = np.where(violations <= bar, 0.0, violations)
    rank = ranks(losses, relaxed)
    order: list[int] = []
    for level in np.unique(rank):
        members = np.flatnonzero(rank == level)
        order += list(members[_epsilon_net(losses[members])])
    return np.array(order, dtype=int)


def _epsilon_net(points: np.ndarray) -> np.ndarray:
    """Order in which each next point is the one farthest from all before it."""
    if len(points) < 3 or np.isnan(points).any():
        return np.arange(len(points))
    span = np.ptp(points, axis=0)
    unit = points / np.where(span > 0, span, 1.0)
    order = [int(np.argmin(points[:, 0]))]
    distance = np.linalg.norm(unit - unit[order[0]], axis=1)
    while len(order) < len(points):
        distance[order] = -1.0
        order.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(unit - unit[order[-1]], axis=1))
    return np.array(order)
