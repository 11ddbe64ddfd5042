"""What people write for a limit ("0.5x", "1%", "10MB", "30m"), and the constraint that it means."""

from __future__ import annotations

import re
from typing import Any

import click

from ray_nascomp.goals import Constraint, Objective

_UNITS = {
    "latency": {"ms": 1.0, "us": 1e-3, "s": 1e3},
    "size": {"mb": 1.0, "kb": 1e-3, "gb": 1e3},
    "params": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9},
}
_RATIOS = {"latency": "speedup", "size": "size_ratio", "params": "params_ratio", "macs": "macs_ratio"}
_METRICS = {"latency": "latency_ms", "size": "size_mb", "params": "params", "macs": "macs"}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_BOUND = re.compile(r"\s*([\w/.]+)\s*(<=|>=)\s*(-?\d*\.?\d+(?:[eE][+-]?\d+)?)\s*")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)\s*([a-zA-Z%]*)")


class Limit(click.ParamType):
    """An upper limit on a cost: a share of the original ("0.5x", "50%") or a number with its unit.

    Args:
        what: "latency", "size", "params" or "macs".
    """

    name = "limit"

    def __init__(self, what: str) -> None:
        self._what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Constraint:
        """The constraint of a text."""
        if isinstance(value, Constraint):
            return value
        number, unit = _parse(str(value))
        if not number or unit not in ("x", "%", *_UNITS[self._what]):
            example = {"latency": "2ms", "size": "10MB", "params": "1M", "macs": "50M"}[self._what]
            self.fail(f"{value!r} was given; a share of the original as in 0.5x, or {example}, is allowed", param, ctx)
        if unit in ("x", "%"):
            return Constraint(_RATIOS[self._what], ">=", (100 if unit == "%" else 1) / number)
        return Constraint(_METRICS[self._what], "<=", number * _UNITS[self._what][unit])


class Drop(click.ParamType):
    """How much of the metric may be lost: "1%" is 0.01, a plain number is in the metric's unit."""

    name = "drop"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The drop in the metric's unit."""
        if isinstance(value, float):
            return value
        number, unit = _parse(str(value).strip())
        if number is None or unit not in ("", "%"):
            self.fail(f"{value!r} was given; 1% or 0.01 is allowed", param, ctx)
        return number / 100 if unit == "%" else number


class Duration(click.ParamType):
    """A time: "90s", "30m", "2h"; a plain number is seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, (int, float)):
            return float(value)
        number, unit = _parse(str(value))
        if not number or unit not in ("", *_SECONDS):
            self.fail(f"{value!r} was given; 90s, 30m or 2h is allowed", param, ctx)
        return number * _SECONDS.get(unit, 1.0)


class Bound(click.ParamType):
    """A constraint on any reported metric: "size_mb <= 1"."""

    name = "constraint"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Constraint:
        """The constraint of a text."""
        if isinstance(value, Constraint):
            return value
        match = _BOUND.fullmatch(str(value))
        if match is None:
            self.fail(f'{value!r} was given; a text such as "size_mb <= 1" is allowed', param, ctx)
        return Constraint(match[1], match[2], float(match[3]))  # type: ignore[arg-type]


class Aim(click.ParamType):
    """An objective: "speedup", or "size_mb min" where less is better."""

    name = "objective"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Objective:
        """The objective of a text."""
        if isinstance(value, Objective):
            return value
        metric, *rest = str(value).replace(":", " ").split() or [""]
        if not metric or len(rest) > 1 or (rest and rest[0] not in ("min", "max")):
            self.fail(f'{value!r} was given; a text such as "speedup" or "size_mb min" is allowed', param, ctx)
        return Objective(metric, rest[0] if rest else "max")  # type: ignore[arg-type]


def _parse(text: str) -> tuple[float | None, str]:
    match = _NUMBER.fullmatch(text.strip())
    return (float(match[1]), match[2].lower()) if match else (None, "")
