"""Fronts and their indicators, over moocore. Every array of losses is minimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import moocore
import numpy as np

from ray_nascomp.goals import Goal


def front_indices(goal: Goal, results: Sequence[Mapping[str, Any]]) -> list[int]:
    """Positions of the feasible results that no other dominates.

    Equal results are kept once, the earliest. A result with NaN is never on the front.
    """
    feasible = [i for i, metrics in enumerate(results) if goal.is_feasible(metrics)]
    if not feasible:
        return []
    losses = np.stack([goal.losses(results[i]) for i in feasible])
    mask = moocore.is_nondominated(losses)
    return [index for index, keep in zip(feasible, mask, strict=True) if keep]


def hypervolume(losses: np.ndarray, reference: np.ndarray) -> float:
    """Volume dominated by `losses` (n, m) within `reference` (m,); rows beyond it count nothing."""
    losses = np.asarray(losses, dtype=float).reshape(-1, len(reference))
    inside = losses[np.isfinite(losses).all(axis=1) & (losses < reference).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=np.asarray(reference, dtype=float))) if len(inside) else 0.0


def normalised_hypervolume(losses: np.ndarray, ideal: np.ndarray, nadir: np.ndarray) -> float:
    """Hypervolume of `losses` (n, m) in the box from `ideal` (m,) to `nadir` (m,), in [0, 1]."""
    span = np.where(np.asarray(nadir) > np.asarray(ideal), np.asarray(nadir) - np.asarray(ideal), 1.0)
    unit = np.maximum((np.asarray(losses, dtype=float).reshape(-1, len(span)) - ideal) / span, 0.0)
    return hypervolume(unit, np.ones(len(span)))


def ranks(losses: np.ndarray, violations: np.ndarray) -> np.ndarray:
    """Non-dominated rank of each row under constrained domination, shape (n,), 0 is best.

    Feasible rows come first by Pareto rank, then infeasible ones by their violation.
    Rows with NaN come last.
    """
    losses = np.asarray(losses, dtype=float)
    violations = np.where(np.isnan(losses).any(axis=1), np.inf, np.asarray(violations, dtype=float))
    result = np.zeros(len(losses), dtype=int)
    feasible = violations == 0
    offset = 0
    if feasible.any():
        result[feasible] = moocore.pareto_rank(losses[feasible])
        offset = int(result[feasible].max()) + 1
    if (~feasible).any():
        _, order = np.unique(violations[~feasible], return_inverse=True)
        result[~feasible] = offset + order
    return result


def knee_index(losses: np.ndarray) -> int:
    """Row of a front (n, m) that lies nearest to the ideal point after scaling each column to [0, 1]."""
    losses = np.asarray(losses, dtype=float)
    low, high = losses.min(axis=0), losses.max(axis=0)
    unit = (losses - low) / np.where(high > low, high - low, 1.0)
    return int(np.argmin(np.linalg.norm(unit, axis=1)))


def crowding(losses: np.ndarray, rank: np.ndarray | None = None) -> np.ndarray:
    """Crowding distance of the points of a front (Deb et al. 2002, NSGA-II): how far each is from its neighbours.

    Args:
        losses: Shape `(n, m)`.
        rank: Which front each point belongs to, shape `(n,)`; all to one if absent.

    Returns:
        Shape `(n,)`: sums over the objectives, infinite at the ends of each; 0 in a front with a NaN.
    """
    distance = np.zeros(len(losses))
    if not len(losses):
        return distance
    rank = np.zeros(len(losses), dtype=int) if rank is None else rank
    for column in losses.T:
        order = np.lexsort((column, rank))
        values, fronts = column[order], rank[order]
        is_first = np.append(True, fronts[1:] != fronts[:-1])
        is_last = np.append(is_first[1:], True)
        span = (values[is_last] - values[is_first])[np.cumsum(is_first) - 1]
        inner = np.flatnonzero(~is_first & ~is_last & (span > 0))
        distance[order[inner]] += (values[inner + 1] - values[inner - 1]) / span[inner]
        distance[order[is_first | is_last]] = np.inf
    distance[np.isin(rank, rank[np.isnan(losses).any(axis=1)])] = 0.0
    return distance


def best_first(losses: np.ndarray, violations: np.ndarray) -> np.ndarray:
    """Positions from best to worst: constrained non-dominated rank, then crowding (NSGA-II).

    Args:
        losses: Objectives to minimise, shape `(n, m)`; rows with NaN come last.
        violations: Constraint violations, shape `(n,)`, 0 for feasible rows.

    Returns:
        Shape `(n,)`; equals in the order in which they were given.
    """
    rank = ranks(losses, violations)
    return np.lexsort((-crowding(losses, rank), rank))
