"""Bits for each layer under a budget: adaptive quantization as an integer program.

The sum of what each layer's bits add to the loss becomes as small as the budget allows (HAWQ-V3,
Yao et al. 2021, arXiv 2011.10680, with measured losses in place of Hessians).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ray_nascomp.errors import ConfigError


def allocate_bits(
    sensitivity: Mapping[str, Mapping[int, float]], cost: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    """The bits of each layer that add least to the loss within the budget.

    Args:
        sensitivity: Layer name -> bits -> increase of the loss, any finite number.
        cost: Layer name -> bits -> cost in any unit (bytes, bit operations), for the same layers and bits.
        budget: What all layers together may cost, in the unit of `cost`.

    Returns:
        Layer name -> bits, in the order of `sensitivity`.

    Raises:
        ConfigError: If layers or bits of the two tables differ, a number is not finite, or no choice
            fits into the budget; the message says what the least is.
    """
    choices = _choices(sensitivity, cost)
    if math.isnan(budget):
        raise ConfigError(f"bits: a budget of {budget!r} was given, a number is allowed")
    least = sum(min(cost[name].values()) for name in sensitivity)
    # Sums of the same numbers in another order differ by rounding.
    limit = budget + 1e-9 * abs(budget)
    if least > limit:
        raise ConfigError(f"bits: a budget of {budget:g} was given, the least that all layers can cost is {least:g}")
    if not choices:
        return {}
    chosen = _solve(choices, sensitivity, cost, limit - least)
    return {name: bits for (name, bits), is_chosen in zip(choices, chosen, strict=True) if is_chosen}


def _choices(
    sensitivity: Mapping[str, Mapping[int, float]], cost: Mapping[str, Mapping[int, float]]
) -> list[tuple[str, int]]:
    """All pairs of layer and bits, checked."""
    if sensitivity.keys() != cost.keys():
        different = sorted(sensitivity.keys() ^ cost.keys())
        raise ConfigError(f"bits: sensitivity and cost have to name the same layers; only one has {different}")
    for name, losses in sensitivity.items():
        if not losses or losses.keys() != cost[name].keys():
            raise ConfigError(
                f"bits.{name}: sensitivity has {sorted(losses)} and cost {sorted(cost[name])}; they need the same bits"
            )
        for what, table in (("sensitivity", losses), ("cost", cost[name])):
            for bits, value in table.items():
                if not math.isfinite(value):
                    raise ConfigError(
                        f"bits.{name}.{bits}: a {what} of {value!r} was given, a finite number is allowed"
                    )
    return [(name, bits) for name, losses in sensitivity.items() for bits in losses]


def _solve(
    choices: list[tuple[str, int]],
    sensitivity: Mapping[str, Mapping[int, float]],
    cost: Mapping[str, Mapping[int, float]],
    spare: float,
) -> np.ndarray:
    """Which of the choices are made; `spare` is what may be spent beyond each layer's cheapest."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    names = list(sensitivity)
    rows = [names.index(name) for name, _ in choices]
    one_each = csr_array((np.ones(len(choices)), (rows, range(len(choices)))), shape=(len(names), len(choices)))
    losses = np.array([sensitivity[name][bits] for name, bits in choices])
    extra = np.array([cost[name][bits] - min(cost[name].values()) for name, bits in choices])
    # The solver's tolerances are absolute; both tables are brought to its scale.
    losses = losses / (np.abs(losses).max() or 1.0)
    scale = extra.max() or 1.0
    result = milp(
        losses,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(extra[None] / scale, -np.inf, spare / scale)],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"scipy's milp found no bits: {result.message}")
    return result.x > 0.5
