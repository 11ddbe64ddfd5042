"""NNI's model spaces as dimensions of a Tune search: hand-written ones and those of NNI's hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from ray import tune
from torch import nn

from ray_nascomp.errors import ConfigError
from ray_nascomp.nni_adapter import spaces
from ray_nascomp.space import when

_MOST_COMBINATIONS = 1024
_TAIL = 0.00135
"""Share of a normal distribution beyond three standard deviations on one side."""


class NNISpace:
    """Builds the networks of an NNI model space.

    A network that is built has random weights of its own seed, the same whenever and wherever it
    is built; `Task` then copies into it what its model has under the same names.

    Args:
        make: Makes the space anew.
        symbols: Label -> NNI's mutable.
        constraints: NNI's constraints between them.

    Attributes:
        default: The architecture that NNI takes where nothing is chosen: a model to train first.
    """

    def __init__(self, make: Callable[[], nn.Module], symbols: Mapping[str, Any], constraints: list[Any]) -> None:
        self._make = make
        self._symbols = dict(symbols)
        self._constraints = constraints
        self._options = {label: options_of(symbol) for label, symbol in self._symbols.items()}
        sample = spaces.default_sample(self._symbols, constraints)
        self.default: dict[str, Any] = {}
        for label in self._symbols:
            if (value := self._given(label, sample[label])) is not None:
                self.default[key_of(label)] = value

    def __call__(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The network of an architecture.

        Raises:
            InfeasibleError: If a constraint of the space forbids it.
        """
        sample = self.sample(architecture)
        spaces.import_nni_spaces()
        spaces.check(self._constraints, sample)
        text = json.dumps(architecture, sort_keys=True, default=str)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
            return spaces.freeze(self._make, sample)

    def sample(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """An architecture as NNI writes it: label -> value."""
        return {label: self._chosen(label, architecture.get(key_of(label))) for label in self._symbols}

    def _chosen(self, label: str, given: Any) -> Any:
        """NNI's value for ours; None stands for a choice of one option."""
        options = self._options[label]
        if isinstance(given, Mapping):
            return [value for name, value in options.items() if given[str(name)]]
        if options:
            return next(iter(options.values())) if given is None else options[given]
        return self._symbols[label].qclip(given)

    def _given(self, label: str, chosen: Any) -> Any:
        """Our value for NNI's."""
        options = self._options[label]
        if not options:
            return chosen
        if _is_subset(self._symbols[label]):
            return {str(name): value in chosen for name, value in options.items()}
        return next(name for name, value in options.items() if value == chosen) if len(options) > 1 else None


def nni_space(space: Any) -> tuple[NNISpace, dict[str, Any]]:
    """A builder of an NNI model space's networks and its dimensions, for `Task(build=..., architecture=...)`.

    A choice of one becomes a categorical dimension, ascending where its values are numbers; values
    that are neither numbers nor text are named by their text. A choice of several of `n` inputs
    becomes one dimension of all combinations, a choice of any number of them a true or false for
    each. A number becomes a float or integer dimension between its bounds (three standard
    deviations where it has none). NNI's prior weights of choices are not taken over. What
    matters only under another choice, in a candidate layer or in a block that a depth may leave
    out, is conditional on it. Constraints between choices make architectures infeasible.

    Args:
        space: An instance of a ModelSpace. Its class and the arguments that it was made with are
            kept, not its weights; a network is made anew from these.

    Returns:
        The builder, whose `default` is a first architecture, and its dimensions by NNI's labels, in
        which "." stands for "/", as Tune splits names at it.

    Raises:
        ConfigError: If it is not a ModelSpace, has nothing to choose, or a mutable that is not known.
    """
    spaces.import_nni_spaces()
    from nni.nas.nn.pytorch import ModelSpace

    if not isinstance(space, ModelSpace):
        raise ConfigError(f"space: a {type(space).__name__} was given, an instance of an nni.nas ModelSpace is allowed")
    symbols, constraints = spaces.symbols_and_constraints(space)
    build = NNISpace(partial(space.trace_symbol, *space.trace_args, **space.trace_kwargs), symbols, constraints)
    conditions = spaces.conditions(space)
    architecture: dict[str, Any] = {}
    for label, symbol in symbols.items():
        options = options_of(symbol)
        if len(options) == 1 and not _is_subset(symbol):
            continue
        if key_of(label) in architecture:
            raise ConfigError(f"space: two choices are labelled {label!r}, where '.' and '/' are the same")
        condition = conditions.get(label)

        def conditional(domain: Any, condition: spaces.Condition | None = condition) -> Any:
            if condition is None or len(options_of(symbols[condition.label])) == 1:
                return domain
            other = options_of(symbols[condition.label])
            names = [name for name, value in other.items() if value in condition.values]
            return when(domain, f"architecture/{key_of(condition.label)}", names)

        if _is_subset(symbol):
            architecture[key_of(label)] = {str(name): conditional(tune.choice([True, False])) for name in options}
        else:
            architecture[key_of(label)] = conditional(tune.choice(list(options)) if options else _number(symbol))
    if not architecture:
        raise ConfigError("space: it has nothing to choose from")
    return build, architecture


def key_of(label: str) -> str:
    """The name of a dimension for NNI's label."""
    return label.replace("/", ".")


def options_of(symbol: Any) -> dict[Any, Any]:
    """Our plain values of a choice -> NNI's; empty for a number."""
    from nni.mutable import Categorical, CategoricalMultiple

    if isinstance(symbol, Categorical):
        options = {_plain(value): value for value in symbol.values}
        if all(isinstance(name, (int, float)) and not isinstance(name, bool) for name in options):
            return dict(sorted(options.items()))
        return options
    if isinstance(symbol, CategoricalMultiple):
        if symbol.n_chosen is None:
            return {_plain(value): value for value in symbol.values}
        if symbol.n_chosen == 1:
            return {_plain(value): [value] for value in symbol.values}
        count = math.comb(len(symbol.values), symbol.n_chosen)
        if count > _MOST_COMBINATIONS:
            raise ConfigError(
                f"space: {symbol.label!r} has {count} combinations, up to {_MOST_COMBINATIONS} are allowed"
            )
        combinations = itertools.combinations(symbol.values, symbol.n_chosen)
        return {"+".join(str(_plain(value)) for value in values): list(values) for values in combinations}
    return {}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _is_subset(symbol: Any) -> bool:
    """Whether any number of values can be chosen."""
    from nni.mutable import CategoricalMultiple

    return isinstance(symbol, CategoricalMultiple) and symbol.n_chosen is None


def _number(symbol: Any) -> Any:
    low = symbol.low if math.isfinite(symbol.low) else float(symbol.distribution.ppf(_TAIL))
    high = symbol.high if math.isfinite(symbol.high) else float(symbol.distribution.ppf(1 - _TAIL))
    step = symbol.quantize
    if step is None:
        return tune.loguniform(low, high) if symbol.log_distributed else tune.uniform(low, high)
    low, high = math.ceil(low / step) * step, math.floor(high / step) * step
    if isinstance(step, int):
        return tune.lograndint(low, high + 1) if symbol.log_distributed else tune.qrandint(low, high, step)
    return tune.quniform(low, high, step)
