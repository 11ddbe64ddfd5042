"""Where a learning curve ends, told from the curves of trials that have run in full.

Networks under a falling learning rate improve most at the end, so that a curve by itself says little
of where it leads; but where one stands beside others that stood there once, it says much (last
values seen as features of the final one: Baker et al. 2017, arXiv 1705.10823). The final value is
taken for a linear function of the present one, plus noise, under a conjugate
normal-inverse-gamma prior, so that the prediction is a Student t.
"""

from __future__ import annotations

import numpy as np

_PRIOR_VARIANCE = 100.0
"""Of offset and slope, in squared noise: they may be as large as the values' scale."""
_PRIOR_SHAPE, _PRIOR_NOISE = 2.0, 0.1
"""Of the noise: worth four trials, a tenth of the final values' scale."""


def probability_below(value: float, seen: np.ndarray, ends: np.ndarray, bound: float) -> float:
    """Probability that a trial ends at or below a bound.

    Args:
        value: Its value now.
        seen: Values that other trials had when they were as far, finite, shape `(n,)`, n at least 1.
        ends: The values with which these ended, shape `(n,)`.
        bound: The bound, in the unit of the values.

    Returns:
        A number in [0, 1].
    """
    from scipy.special import stdtr

    scale = np.ptp([*seen, value]) or 1.0
    basis = np.stack([np.ones(len(seen)), (np.asarray(seen) - value) / scale], axis=1)
    target = (np.asarray(ends) - bound) / (np.ptp(ends) or 1.0)
    precision = np.eye(2) / _PRIOR_VARIANCE + basis.T @ basis
    covariance = np.linalg.inv(precision)
    mean = covariance @ (basis.T @ target)
    shape = _PRIOR_SHAPE + len(target) / 2
    rate = _PRIOR_SHAPE * _PRIOR_NOISE**2 + 0.5 * (target @ target - mean @ precision @ mean)
    # The offset is the prediction: the present value lies at zero.
    spread = np.sqrt(rate / shape * (1.0 + covariance[0, 0]))
    return float(stdtr(2 * shape, -mean[0] / spread))
