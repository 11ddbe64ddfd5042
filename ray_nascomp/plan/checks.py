"""Checks of a config's values, whose errors name the key, what was given and what is allowed."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

from ray_nascomp.errors import ConfigError

ALL = "*"
"""Key that stands for every group or layer that is not named."""


def mapping(value: object, key: str) -> Mapping[str, Any]:
    """The value, if it is a dict."""
    if not _is_mapping(value):
        raise ConfigError(f"{key}: {value!r} was given, a dict is allowed")
    return cast("Mapping[str, Any]", value)


def _is_mapping(value: object) -> bool:
    # Asking an abstract class takes long, and this is asked ten times a config.
    return type(value) is dict or isinstance(value, Mapping)


def check_keys(section: Mapping[str, Any], stage: type, key: str, hidden: Collection[str] = ()) -> None:
    """Refuses keys that are not fields of a stage."""
    allowed = _fields(stage)
    if section.keys() <= allowed.keys() and not any(name in section for name in hidden):
        return
    names = [name for name in allowed if name not in hidden]
    for name in section:
        if name not in names:
            raise ConfigError.unknown(key, name, names)


_known_fields: dict[type, dict[str, None]] = {}


def _fields(stage: type) -> dict[str, None]:
    if stage not in _known_fields:
        _known_fields[stage] = dict.fromkeys(f.name for f in dataclasses.fields(stage))
    return _known_fields[stage]


def choice(section: Mapping[str, Any], key: str, name: str, allowed: Iterable[str], default: str) -> str:
    """One of some names."""
    value = section.get(name, default)
    if value not in allowed:
        raise ConfigError.unknown(f"{key}.{name}", value, allowed)
    return str(value)


def per_name(value: Any, key: str, names: Collection[str], what: str) -> dict[str, Any]:
    """One value for all, or a dict of values by name, as a dict."""
    if not _is_mapping(value):
        return {ALL: value}
    for name in value:
        if name not in names and name != ALL:
            raise ConfigError.unknown(f"{key}: {what}", name, names)
    return dict(value)


def all_numbers(
    values: dict[str, Any], key: str, lower: float, upper: float, include_lower: bool = True, include_upper: bool = True
) -> dict[str, float]:
    """The dict's numbers between two bounds, to nine digits; see `number`."""
    for name, value in values.items():
        if type(value) is not float or not lower < value < upper:
            # Values on a bound are the commonest of all: searchers leave layers whole.
            is_bound = type(value) is float and (
                (value == lower and include_lower) or (value == upper and include_upper)
            )
            if not is_bound or math.isinf(value):
                value = number(value, f"{key}.{name}", lower, upper, include_lower, include_upper)
        values[name] = round(value, 9)
    return values


def whole(value: Any, key: str) -> int:
    """A whole number of 1 or more."""
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ConfigError(f"{key}: {value!r} was given, a whole number of 1 or more is allowed")
    return int(value)


def number(
    value: Any, key: str, lower: float, upper: float, include_lower: bool = True, include_upper: bool = True
) -> float:
    """A number between two bounds."""
    if type(value) is float and (lower < value < upper or (value == lower and include_lower)):
        return value
    inside = False
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value):
        given = float(value)
        above = given >= lower if include_lower else given > lower
        below = given <= upper if include_upper else given < upper
        inside = above and below and math.isfinite(given)
    if not inside:
        left, right = "[" if include_lower else "(", "]" if include_upper and math.isfinite(upper) else ")"
        raise ConfigError(f"{key}: {value!r} was given, a number in {left}{lower:g}, {upper:g}{right} is allowed")
    return float(value)
