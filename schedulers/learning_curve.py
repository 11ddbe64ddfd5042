"""A learning curve extrapolated, with its uncertainty.

The curve is taken for a power law, one of the families of Domhan et al. 2015 ("Speeding up
automatic hyperparameter optimization of deep neural networks by extrapolation of learning
curves", IJCAI): `value = end + slope * time ** -decay` plus noise. Its linear part has a
conjugate normal-inverse-gamma prior, so that the prediction is a Student t; several decays are
averaged by their evidence.
"""

from __future__ import annotations

import numpy as np

_DECAYS = (0.25, 0.5, 1.0, 2.0)
_PRIOR_VARIANCE = 100.0
"""Of the linear part, in squared noise: end and slope may be as large as the curve's scale."""
_PRIOR_SHAPE, _PRIOR_NOISE = 2.0, 0.1
"""Of the noise: worth four reports, a tenth of the curve's scale."""


def probability_below(times: np.ndarray, values: np.ndarray, end: float, bound: float) -> float:
    """Probability that a curve lies at or below a bound at a later time.

    Args:
        times: Measure of progress of each report, positive, shape `(n,)`.
        values: The reported values, finite, shape `(n,)`, n at least 1.
        end: The later time.
        bound: The bound, in the unit of the values.

    Returns:
        A number in [0, 1].
    """
    from scipy.special import stdtr

    times, values = np.asarray(times, dtype=float), np.asarray(values, dtype=float)
    # Relative to the bound and in units of the curve's own scale, so that any metric will do.
    scale = max(float(np.ptp(values)), abs(float(values[-1]) - bound), 1e-12)
    target = (values - bound) / scale
    evidence, probability = [], []
    for decay in _DECAYS:
        basis = np.stack([np.ones_like(times), times**-decay], axis=1)
        ahead = np.array([1.0, end**-decay])
        precision = np.eye(2) / _PRIOR_VARIANCE + basis.T @ basis
        covariance = np.linalg.inv(precision)
        mean = covariance @ (basis.T @ target)
        shape = _PRIOR_SHAPE + len(times) / 2
        rate = _PRIOR_SHAPE * _PRIOR_NOISE**2 + 0.5 * (target @ target - mean @ precision @ mean)
        spread = np.sqrt(rate / shape * (1.0 + ahead @ covariance @ ahead))
        probability.append(float(stdtr(2 * shape, -(ahead @ mean) / spread)))
        evidence.append(-0.5 * np.linalg.slogdet(precision)[1] - shape * np.log(rate))
    weights = np.exp(np.array(evidence) - max(evidence))
    return float(np.average(probability, weights=weights))
