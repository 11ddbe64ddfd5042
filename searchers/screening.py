"""What a config promises: the hypervolume that its predicted losses would add to what was found."""

from __future__ import annotations

import moocore
import numpy as np

from ray_nascomp.goals import Goal
from ray_nascomp.pareto import hypervolume

_BEYOND = 1.1


def judged(goal: Goal, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses `(n, objectives)` and violations `(n,)` of many results at once.

    Args:
        goal: The goal.
        table: Its metrics, finite, shape `(n, metrics)`.
    """
    columns = dict(zip(goal.metrics, table.T, strict=True))
    losses = np.stack([columns[o.metric] * o.sign for o in goal.objectives], axis=1)
    violations = np.zeros(len(table))
    for constraint in goal.constraints:
        excess = columns[constraint.metric] - constraint.bound
        violations += np.maximum(excess if constraint.op == "<=" else -excess, 0.0) / (abs(constraint.bound) or 1.0)
    return losses, violations


class Screen:
    """The front so far, to which candidates are compared.

    Losses are scaled to the range of what was seen; the reference point lies a tenth beyond it.

    Args:
        losses: Losses of the final observations, shape `(n, objectives)`.
        violations: Their violations, shape `(n,)`.
    """

    def __init__(self, losses: np.ndarray, violations: np.ndarray) -> None:
        seen = losses[np.isfinite(losses).all(axis=1)]
        feasible = losses[(violations == 0) & np.isfinite(losses).all(axis=1)]
        self._low = seen.min(axis=0)
        high = seen.max(axis=0)
        self._span = np.where(high > self._low, high - self._low, 1.0)
        front = feasible[moocore.is_nondominated(feasible)] if len(feasible) else feasible
        self._front = (front - self._low) / self._span
        self._reference = np.full(losses.shape[1], _BEYOND)
        self._two = self._front[np.argsort(self._front[:, 0])] if losses.shape[1] == 2 else None

    def gains(self, losses: np.ndarray, violations: np.ndarray) -> np.ndarray:
        """How much each candidate promises, shape `(n,)`; negative where it would add nothing.

        Args:
            losses: Predicted losses, shape `(n, objectives)`.
            violations: Predicted violations, shape `(n,)`.
        """
        points = (losses - self._low) / self._span
        result: np.ndarray = -1e-9 * np.maximum(np.nan_to_num(points, nan=1e6), 0).sum(axis=1)
        broken = (violations > 0) | ~np.isfinite(points).all(axis=1)
        result[broken] = -np.minimum(np.nan_to_num(violations[broken], nan=1e6), 1e6) - 1e-3
        inside = ~broken & (points < _BEYOND).all(axis=1)
        if self._two is not None:
            volume = _area(self._two, points[inside])
        else:
            volume = np.array([self._volume(point) for point in points[inside]])
        result[inside] = np.where(volume > 0, volume, result[inside])
        return np.asarray(result)

    def _volume(self, point: np.ndarray) -> float:
        """What the point dominates within the reference and the front does not."""
        if (self._front <= point).all(axis=1).any():
            return 0.0
        covered = hypervolume(np.maximum(self._front, point), self._reference)
        return float(np.prod(self._reference - point)) - covered


def _area(front: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Of each point `(n, 2)`, the area it dominates and the front `(m, 2)`, sorted by the first loss, does not."""
    if not len(points):
        return np.zeros(0)
    # Between two neighbours of the front its height is the left one's second loss.
    left = np.concatenate([[-np.inf], front[:, 0]])
    right = np.concatenate([front[:, 0], [np.inf]])
    height = np.minimum(np.concatenate([[_BEYOND], front[:, 1]]), _BEYOND)
    width = np.minimum(right, _BEYOND) - np.maximum(left, points[:, :1])
    return np.asarray((np.maximum(width, 0) * np.maximum(height - points[:, 1:], 0)).sum(axis=1))
