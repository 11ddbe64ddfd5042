"""Dimensions of a search space: one Tune domain each, with its role in a compression plan."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer, Quantized

from ray_nascomp.errors import ConfigError

SPARSITY_STEP = 0.05
"""Default step of a sparsity, so that trials meet in what they have in common."""

_CONDITION = "ray_nascomp_condition"


class Role(str, Enum):
    """What a dimension decides. It follows from the dimension's place in the space."""

    ARCHITECTURE = "architecture"
    SPARSITY = "sparsity"
    BITS = "bits"
    RANK = "rank"
    DISTILLATION = "distillation"
    TRAINING = "training"


def sparsity(lower: float = 0.0, upper: float = 0.9, step: float = SPARSITY_STEP) -> Float:
    """A sparsity to search: the share of channels to remove, from `lower` to `upper` in steps.

    Raises:
        ConfigError: If the bounds are not within [0, 1) or not multiples of the step.
    """
    if not 0 <= lower < upper < 1:
        raise ConfigError(f"sparsity: bounds {lower!r} and {upper!r} were given, 0 <= lower < upper < 1 is allowed")
    if not 0 < step <= upper - lower:
        raise ConfigError(f"sparsity: step {step!r} was given, a number from 0 to {upper - lower:g} is allowed")
    try:
        domain: Float = tune.quniform(lower, upper, step)
    except ValueError as error:
        raise ConfigError(f"sparsity: {lower!r} and {upper!r} have to be multiples of the step {step!r}") from error
    return domain


def bits(choices: Sequence[int] = (8, 32)) -> Categorical:
    """Bits to search; 32 means not quantized.

    Raises:
        ConfigError: If a choice is not a whole number from 1 to 32.
    """
    if not choices or any(isinstance(b, bool) or not isinstance(b, int) or not 1 <= b <= 32 for b in choices):
        raise ConfigError(f"bits: {choices!r} was given, whole numbers from 1 to 32 are allowed")
    domain: Categorical = tune.choice(sorted(choices))
    return domain


def rank(lower: float = 0.1, upper: float = 1.0, step: float = 0.1) -> Float:
    """A rank to search, as a share in (0, 1] of the largest that saves parameters; 1 means not factorised.

    Raises:
        ConfigError: If the bounds are not within (0, 1].
    """
    if not 0 < lower < upper <= 1:
        raise ConfigError(f"rank: bounds {lower!r} and {upper!r} were given, 0 < lower < upper <= 1 is allowed")
    domain: Float = tune.quniform(lower, upper, step)
    return domain


def when(domain: Domain, key: str, values: Iterable[Any]) -> Domain:
    """The domain, active only while the dimension at `key` has one of `values`.

    An inactive dimension keeps its key in every config, with a canonical value that counts
    for nothing.

    Args:
        domain: Any Tune domain.
        key: The other dimension's place, joined by "/" as Tune does: "architecture/depth".
        values: The other dimension's values for which this one matters.
    """
    conditional = copy.copy(domain)
    setattr(conditional, _CONDITION, (tuple(key.split("/")), tuple(values)))
    return conditional


@dataclass(frozen=True)
class Dimension:
    """One searched value of a config.

    Attributes:
        path: Keys that lead to the value in the nested config.
        kind: "float", "integer" or "categorical".
        lower: Smallest value, numeric kinds only.
        upper: Largest value, inclusive, numeric kinds only.
        log: Whether values are uniform in logarithm.
        step: Distance between neighbouring values, None for a continuous dimension.
        categories: The values of a categorical.
        condition: Path and values of the dimension that this one depends on.
    """

    path: tuple[str, ...]
    kind: Literal["float", "integer", "categorical"]
    lower: float = 0.0
    upper: float = 0.0
    log: bool = False
    step: float | None = None
    categories: tuple[Any, ...] = ()
    condition: tuple[tuple[str, ...], tuple[Any, ...]] | None = None

    @classmethod
    def from_domain(cls, path: tuple[str, ...], domain: Domain) -> Dimension:
        """The dimension of a Tune domain that stands at `path`.

        Raises:
            ConfigError: If the domain is a function or a grid, which cannot be searched.
        """
        condition = getattr(domain, _CONDITION, None)
        sampler = domain.get_sampler()
        step = None
        if isinstance(sampler, Quantized):
            step = float(sampler.q)
            sampler = sampler.get_sampler()
        log = type(sampler).__name__ == "_LogUniform"
        if isinstance(domain, Categorical) and not domain.is_grid():
            return cls(path, "categorical", categories=tuple(domain.categories), condition=condition)
        if isinstance(domain, Integer):
            step = int(step) if step is not None else 1
            upper = domain.upper if step > 1 else domain.upper - 1
            first, last = math.ceil(domain.lower / step), math.floor(upper / step)
            return cls(path, "integer", first * step, last * step, log, step, condition=condition)
        if isinstance(domain, Float):
            lower, upper = domain.lower, domain.upper
            if type(sampler).__name__ == "_Normal":
                lower, upper = sampler.mean - 3 * sampler.sd, sampler.mean + 3 * sampler.sd
            return cls(path, "float", float(lower), float(upper), log, step, condition=condition)
        raise ConfigError(
            f"{'/'.join(path)}: a {type(domain).__name__.lower()} cannot be searched; allowed: "
            "uniform, loguniform, randint, choice and their quantized forms, or a constant"
        )

    @property
    def name(self) -> str:
        """The path joined by "/", as Tune writes it."""
        return "/".join(self.path)

    @cached_property
    def role(self) -> Role:
        """What the dimension decides."""
        if self.path[0] == "architecture":
            return Role.ARCHITECTURE
        if "distill" in self.path:
            return Role.DISTILLATION
        return next((role for role in (Role.SPARSITY, Role.BITS, Role.RANK) if role.value in self.path), Role.TRAINING)

    @property
    def target(self) -> str | None:
        """The layer or group that a sparsity, bits or a rank is for; None where it is for all."""
        if self.role in (Role.SPARSITY, Role.BITS, Role.RANK) and self.path[-1] != self.role.value:
            return self.path[-1]
        return None

    @property
    def levels(self) -> tuple[Any, ...] | None:
        """All values in order, or None for a continuous dimension."""
        if self.kind == "categorical":
            return self.categories
        if self.step is None:
            return None
        count = round((self.upper - self.lower) / self.step) + 1
        return tuple(self._cast(self.lower + i * self.step) for i in range(count))

    @property
    def count(self) -> int | None:
        """Number of values, or None for a continuous dimension."""
        if self.kind == "categorical":
            return len(self.categories)
        return None if self.step is None else round((self.upper - self.lower) / self.step) + 1

    @cached_property
    def is_ordinal(self) -> bool:
        """Whether neighbouring values are alike: numeric kinds, and categoricals of ascending numbers."""
        if self.kind != "categorical":
            return True
        numeric = all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in self.categories)
        return numeric and list(self.categories) == sorted(set(self.categories)) and len(self.categories) > 2

    @property
    def canonical(self) -> Any:
        """The value that stands for "does not matter" while the dimension is inactive."""
        return self.categories[0] if self.kind == "categorical" else self._cast(self.lower)

    def contains(self, value: Any) -> bool:
        """Whether the value is one that the dimension can take."""
        if self.kind == "categorical":
            return any(type(value) is type(c) and value == c for c in self.categories) or value in self.categories
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            return False
        slack = 1e-9 * max(1.0, abs(self.upper - self.lower))
        return self.lower - slack <= float(value) <= self.upper + slack

    def sample(self, rng: np.random.Generator) -> Any:
        """A value drawn as Tune would: uniform, or uniform in logarithm."""
        if self.kind == "categorical":
            return self.categories[int(rng.integers(len(self.categories)))]
        if self.step is not None and not self.log:
            count = round((self.upper - self.lower) / self.step) + 1
            return self._cast(self.lower + int(rng.integers(count)) * self.step)
        return self.from_unit(float(rng.random()))

    def to_unit(self, value: Any) -> float:
        """The value's place in [0, 1]; a categorical's is its index over the number of its values less one.

        Raises:
            ConfigError: If the dimension cannot take the value.
        """
        if not self.contains(value):
            raise ConfigError(f"{self.name}: {value!r} was given, allowed: {self.allowed}")
        if self.kind == "categorical":
            return self.categories.index(value) / max(1, len(self.categories) - 1)
        if self.upper <= self.lower:
            return 0.0
        transform = math.log if self.log else float
        low, high = transform(self.lower), transform(self.upper)
        return min(1.0, max(0.0, (transform(float(value)) - low) / (high - low)))

    def from_unit(self, unit: float) -> Any:
        """The value nearest to a place in [0, 1]."""
        unit = min(1.0, max(0.0, unit))
        if self.kind == "categorical":
            return self.categories[round(unit * (len(self.categories) - 1))]
        if self.log:
            low, high = math.log(self.lower), math.log(self.upper)
            return self._cast(math.exp(low + unit * (high - low)))
        return self._cast(self.lower + unit * (self.upper - self.lower))

    @property
    def allowed(self) -> str:
        """The values in words, for error messages."""
        if self.kind == "categorical":
            return ", ".join(repr(c) for c in self.categories)
        stepped = f" in steps of {self.step:g}" if self.step is not None else ""
        return f"{self.lower:g} to {self.upper:g}{stepped}"

    def _cast(self, value: float) -> float | int:
        if self.step is not None:
            value = round(value / self.step) * self.step
        value = min(self.upper, max(self.lower, value))
        return round(value) if self.kind == "integer" else round(float(value), 12)
