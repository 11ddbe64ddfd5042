"""What a result is worth to somebody with given weights of the objectives."""

from __future__ import annotations

import numpy as np

_RANK_SHARE = 0.75
_UTOPIA = 0.5
_SUM_SHARE = 0.1
_WORST = -3.0
_LARGEST_ADVANTAGE = 3.0


class Reward:
    """Rewards on a scale that follows from what was seen.

    A loss is scaled for the greater part to its rank among what was seen and for the rest to the
    range, so that a few bad results do not hide the differences between good ones, and going beyond
    the best pays. The reward of a feasible result is its augmented weighted Chebyshev distance to a
    utopia (Steuer and Choo 1983), negated. The utopia lies half a range beyond the best seen: an
    attained one would leave nothing to reach for at the ends of the front. An infeasible result
    has less than any feasible one, and less the more it violates, after the hard form of Tan et al.
    2019 (arXiv 1807.11626).

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
        linear = (losses - self._low) / self._span
        return np.asarray(_RANK_SHARE * np.stack(ranked, axis=1) + (1 - _RANK_SHARE) * linear)

    def __call__(self, scaled: np.ndarray, violations: np.ndarray, preferences: np.ndarray) -> np.ndarray:
        """Rewards, shape `(preferences, n)`.

        Args:
            scaled: Scaled losses, shape `(n, objectives)`.
            violations: Violations of the constraints, 0 for none, shape `(n,)`.
            preferences: Weights of the objectives, shape `(preferences, objectives)`, each row of sum 1.
        """
        distances = (scaled + _UTOPIA)[None] * preferences[:, None]
        rewards = np.maximum(-distances.max(axis=2) - _SUM_SHARE * distances.sum(axis=2), _WORST)
        broken = (violations > 0) | ~np.isfinite(scaled).all(axis=1)
        return np.asarray(np.where(broken, _WORST - np.minimum(violations, 1.0), rewards))


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
