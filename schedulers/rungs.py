"""Which of the results that have come equally far are worth going on with."""

from __future__ import annotations

import numpy as np

from ray_nascomp.pareto import best_first


def most_promising(
    losses: np.ndarray, violations: np.ndarray, tolerated: float, lasting: np.ndarray | None = None
) -> np.ndarray:
    """Positions of results, those that are most worth going on with first.

    Early in training most compressed models still break an accuracy constraint, the most
    compressed ones worst. So the bar is relative: of the results whose violation training may
    mend, so large a share counts as feasible for now. Among these come lower non-dominated ranks first, and within a
    rank what is crowded least (NSGA-II). The others follow by violation. Results with NaN come
    last.

    Args:
        losses: Objectives to minimise, shape `(n, m)`.
        violations: Constraint violations, shape `(n,)`, 0 for feasible results.
        tolerated: The share, 0..1.
        lasting: The parts of the violations that training does not change, shape `(n,)`; none if
            absent.

    Returns:
        Shape `(n,)`.
    """
    violations = np.where(np.isnan(losses).any(axis=1), np.inf, violations)
    may_mend = np.isfinite(violations) & ((lasting == 0) if lasting is not None else True)
    violating = violations[may_mend & (violations > 0)]
    bar = float(np.quantile(violating, tolerated)) if len(violating) else 0.0
    return best_first(losses, np.where(may_mend & (violations <= bar), 0.0, violations))
