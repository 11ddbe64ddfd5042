"""What a search is after: objectives and constraints, as one value that everybody shares.

Domination with constraints follows Deb et al. 2002 (NSGA-II): a feasible result beats an
infeasible one, of two infeasible ones the less violating wins, of two feasible ones the
Pareto-dominating one. The scalar score follows the weighted product of Tan et al. 2019
(MnasNet, arXiv 1807.11626), in logarithms.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ray_nascomp.errors import ConfigError, MissingMetricError

WORST_SCORE = -1e6
"""Score of a result that lacks a finite value for an objective."""

_SECONDARY_WEIGHT = 0.07
_VIOLATION_PENALTY = 10.0


@dataclass(frozen=True)
class Objective:
    """A metric with a direction.

    Args:
        metric: Key of a reported metric.
        mode: "max" or "min".
        weight: Share of the objective in `Goal.score`, positive. None stands for 1 for the
            first objective of a goal and 0.07 for the others, as in MnasNet.

    Raises:
        ConfigError: If the mode or the weight is not allowed.
    """

    metric: str
    mode: Literal["min", "max"] = "max"
    weight: float | None = None

    def __post_init__(self) -> None:
        if not self.metric or not isinstance(self.metric, str):
            raise ConfigError(f"Objective.metric: {self.metric!r} is not a metric's name")
        if self.mode not in ("min", "max"):
            raise ConfigError.unknown(f"mode of objective {self.metric!r}", self.mode, ("min", "max"))
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"weight of objective {self.metric!r}: {self.weight!r} was given, a positive number is allowed"
            )

    @property
    def sign(self) -> float:
        """Factor that turns the metric into a loss to minimise: 1.0 or -1.0."""
        return 1.0 if self.mode == "min" else -1.0


@dataclass(frozen=True)
class Constraint:
    """A metric with a bound.

    Args:
        metric: Key of a reported metric.
        op: "<=" or ">=".
        bound: A finite number.

    Raises:
        ConfigError: If the operator or the bound is not allowed.
    """

    metric: str
    op: Literal["<=", ">="]
    bound: float

    def __post_init__(self) -> None:
        if not self.metric or not isinstance(self.metric, str):
            raise ConfigError(f"Constraint.metric: {self.metric!r} is not a metric's name")
        if self.op not in ("<=", ">="):
            raise ConfigError.unknown(f"operator of the constraint on {self.metric!r}", self.op, ("<=", ">="))
        if not _is_finite(self.bound):
            raise ConfigError(
                f"bound of the constraint on {self.metric!r}: {self.bound!r} was given, a finite number is allowed"
            )

    def violation(self, value: float) -> float:
        """How far `value` is beyond the bound, relative to the bound's size: 0 where it holds."""
        excess = value - self.bound if self.op == "<=" else self.bound - value
        return max(0.0, excess) / (abs(self.bound) or 1.0)

    def __str__(self) -> str:
        return f"{self.metric} {self.op} {self.bound:g}"


@dataclass(frozen=True)
class Goal:
    """Objectives and constraints of a search.

    Args:
        objectives: At least one, each on another metric.
        constraints: Any number.

    Raises:
        ConfigError: If there is no objective, or two on the same metric.
    """

    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()

    def __init__(self, objectives: Iterable[Objective], constraints: Iterable[Constraint] = ()) -> None:
        object.__setattr__(self, "objectives", tuple(objectives))
        object.__setattr__(self, "constraints", tuple(constraints))
        for value, kind, name in (
            *((o, Objective, "objectives") for o in self.objectives),
            *((c, Constraint, "constraints") for c in self.constraints),
        ):
            if not isinstance(value, kind):
                raise ConfigError(f"Goal.{name}: {value!r} was given, only {kind.__name__} is allowed")
        metrics = [objective.metric for objective in self.objectives]
        if not metrics:
            raise ConfigError("Goal.objectives: none was given, at least one is needed")
        if len(set(metrics)) < len(metrics):
            raise ConfigError(f"Goal.objectives: {metrics} names a metric twice")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that an objective or a constraint looks at, without repetition."""
        names = [o.metric for o in self.objectives] + [c.metric for c in self.constraints]
        return tuple(dict.fromkeys(names))

    def check_reported(self, reported: Iterable[str]) -> None:
        """Checks that a trial reports all that the goal looks at.

        Raises:
            MissingMetricError: If it does not.
        """
        known = sorted(reported)
        for metric in self.metrics:
            if metric not in known:
                raise MissingMetricError(
                    f"the goal looks at {metric!r}, which the trial does not report; reported: {', '.join(known)}"
                )

    def losses(self, metrics: Mapping[str, Any]) -> np.ndarray:
        """Objective values as losses to minimise, shape `(objectives,)`.

        A metric that is absent or not a finite number gives NaN.
        """
        values = [as_float(metrics.get(o.metric)) * o.sign for o in self.objectives]
        return np.array(values, dtype=float)

    def violation(self, metrics: Mapping[str, Any]) -> float:
        """Sum of the constraints' relative violations, 0 for a feasible result.

        A result that says `feasible: False`, or lacks a constrained metric, violates infinitely.
        """
        if says_infeasible(metrics):
            return math.inf
        total = 0.0
        for constraint in self.constraints:
            value = as_float(metrics.get(constraint.metric))
            if math.isnan(value):
                return math.inf
            total += constraint.violation(value)
        return total

    def is_feasible(self, metrics: Mapping[str, Any]) -> bool:
        """Whether every constraint holds and every objective has a finite value."""
        return self.violation(metrics) == 0.0 and bool(np.isfinite(self.losses(metrics)).all())

    def dominates(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether `one` dominates `other` under the constraints (see the module's docstring)."""
        first, second = self.violation(one), self.violation(other)
        if first != second:
            return first < second
        a, b = self.losses(one), self.losses(other)
        if np.isnan(a).any() or np.isnan(b).any():
            return bool(not np.isnan(a).any() and np.isnan(b).any())
        return bool((a <= b).all() and (a < b).any())

    def score(self, metrics: Mapping[str, Any]) -> float:
        """One finite number to maximise, for searchers and schedulers that know a single metric.

        The sum of the objectives' weighted gains, each in inverse hyperbolic sine (linear for
        small values such as accuracies, logarithmic for large ones such as latencies), less
        ten times the violation. The first objective weighs 1, the others 0.07, unless told.
        """
        losses = self.losses(metrics)
        if np.isnan(losses).any() or not math.isfinite(violation := self.violation(metrics)):
            return WORST_SCORE
        gain = 0.0
        for index, (objective, loss) in enumerate(zip(self.objectives, losses, strict=True)):
            weight = objective.weight
            if weight is None:
                weight = 1.0 if index == 0 else _SECONDARY_WEIGHT
            gain -= weight * math.asinh(loss)
        return max(WORST_SCORE, gain - _VIOLATION_PENALTY * violation)

    def to_json(self) -> str:
        """The goal as JSON text, for records."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Goal:
        """The goal of `to_json`."""
        data = json.loads(text)
        return cls(
            [Objective(**entry) for entry in data["objectives"]],
            [Constraint(**entry) for entry in data["constraints"]],
        )


def says_infeasible(metrics: Mapping[str, Any]) -> bool:
    """Whether a result says that its plan cannot be carried out, whatever else it has."""
    return bool(metrics.get("feasible") == 0)


def _is_finite(value: object) -> bool:
    return not math.isnan(as_float(value))


def as_float(value: object) -> float:
    """The value as a float; NaN for whatever is not a finite number."""
    if isinstance(value, (bool, str)) or value is None:
        return math.nan
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan
