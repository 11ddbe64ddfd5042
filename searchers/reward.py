"""What a result is worth to somebody with given weights of the objectives."""

from __future__ import annotations

import numpy as np

_BEYOND = 1.1
_SUM_SHARE = 0.1
_LARGEST_ADVANTAGE = 3.0


class Reward:
    """Rewards on a scale that follows from what was seen.

    A loss is scaled by half to the range of what was seen and by half to its rank there, so that a
    few bad results do not hide the differences between good ones. The reward of a feasible result is
    its hypervolume scalarisation (Zhang and Golovin 2020, arXiv 2006.04655): the best of many such
    rewards in random directions are the hypervolume. An infeasible result has less than any feasible
    one, and less the more it violates, after the hard form of Tan et al. 2019 (arXiv 1807.11626).

    Args:
        losses: Losses that were seen, shape `(n, objectives)`, finite, one row at least.
    """

    def __init__(self, losses: np.ndarray) -> None:
        self._sorted = np.sort(losses, axis=0)
        self._low = self._sorted[0]
        span = self._sorted[-1] - self._low
        self._span = np.where(span > 0, span, 1.0)

    def scaled(self, losses: np.ndarray) -> np.ndarray:
        """Losses `(n, objectives)` on the scale, 0 for the best seen and 1 for the worst; NaN stays."""
        ranks = np.linspace(0, 1, len(self._sorted))
        ranked = [np.interp(column, seen, ranks) for column, seen in zip(losses.T, self._sorted.T, strict=True)]
        return np.asarray(((losses - self._low) / self._span + np.stack(ranked, axis=1)) / 2)

    def __call__(self, scaled: np.ndarray, violations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
        """Rewards, shape `(preferences, n)`.

        Args:
            scaled: Scaled losses, shape `(n, objectives)`.
            violations: Violations of the constraints, 0 for none, shape `(n,)`.
            preferences: Weights of the objectives, shape `(preferences, objectives)`, each row of sum 1.
        """
        # A large weight asks for a small loss: its direction is long in that objective.
        directions = np.sqrt(preferences) + 1e-3
        gains = (_BEYOND - scaled)[None] / directions[:, None]
        rewards = np.maximum(gains.min(axis=2) + _SUM_SHARE * gains.mean(axis=2), -1.0)
        broken = (violations > 0) | ~np.isfinite(scaled).all(axis=1)
        return np.where(broken, -1.0 - np.minimum(violations, 1.0), rewards)


def advantages(rewards: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """How much better each reward is than a baseline, in standard deviations, at most 3; shape `(preferences, n)`.

    Args:
        rewards: Rewards, shape `(preferences, n)`.
        weights: How much each counts for the baseline, shape `(n,)`, positive; None stands for all alike.
    """
    baseline = np.average(rewards, axis=1, weights=weights)[:, None]
    variance = np.average((rewards - baseline) ** 2, axis=1, weights=weights)[:, None]
    result = (rewards - baseline) / (np.sqrt(variance) + 1e-6)
    return np.asarray(np.clip(result, -_LARGEST_ADVANTAGE, _LARGEST_ADVANTAGE))
