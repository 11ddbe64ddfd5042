"""NNI's model spaces read: what can be chosen in one, when it matters, and its networks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ray_nascomp.errors import ConfigError, InfeasibleError

_DEFAULT_TRIES = 1000


@dataclass(frozen=True)
class Condition:
    """When something in a space matters.

    Attributes:
        label: NNI's label of another choice.
        values: That choice's values for which it does.
    """

    label: str
    values: tuple[Any, ...]


def import_nni_spaces() -> None:
    """Imports `nni.nas`, without its warnings about torch's newer classes that are no modules.

    Raises:
        ConfigError: If what `nni.nas` needs is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import nni.nas.nn.pytorch  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"space: nni.nas cannot be imported ({error}); pip install 'ray-nascomp[nas]' brings what it needs"
            ) from error


def symbols_and_constraints(space: Any) -> tuple[dict[str, Any], list[Any]]:
    """What is chosen in a space, by label, and what restricts the choice.

    Args:
        space: An NNI ModelSpace.

    Raises:
        ConfigError: If it holds a mutable that is neither a choice nor a number nor a constraint.
    """
    from nni.mutable import Categorical, CategoricalMultiple, Numerical
    from nni.mutable.annotation import MutableAnnotation

    symbols: dict[str, Any] = {}
    constraints: list[Any] = []
    for label, mutable in space.simplify().items():
        if isinstance(mutable, (Categorical, CategoricalMultiple, Numerical)):
            symbols[str(label)] = mutable
        elif isinstance(mutable, MutableAnnotation):
            constraints.append(mutable)
        else:
            raise ConfigError(
                f"space: {label!r} is a {type(mutable).__name__}; Categorical, CategoricalMultiple and Numerical are "
                "allowed"
            )
    return symbols, constraints


def conditions(space: nn.Module) -> dict[str, Condition]:
    """Label -> when its choice matters, for all that do not always matter.

    What stands only in a layer that was not chosen, or in a block beyond a chosen depth, does not.
    """
    found: dict[str, list[Condition | None]] = {}
    for label, condition in _walk(space, None):
        found.setdefault(label, []).append(condition)
    united = {label: _united(places) for label, places in found.items()}
    return {label: condition for label, condition in united.items() if condition is not None}


def check(constraints: list[Any], sample: Mapping[str, Any]) -> None:
    """Raises an InfeasibleError if a sample breaks a constraint."""
    from nni.mutable import SampleValidationError

    for constraint in constraints:
        try:
            error = constraint.check_contains(sample)
        except SampleValidationError as raised:
            error = raised
        if error is not None:
            raise InfeasibleError(f"the model space does not hold this architecture: {error}")


def default_sample(symbols: Mapping[str, Any], constraints: list[Any]) -> dict[str, Any]:
    """NNI's default of each choice; where these break a constraint, the first that does not at random.

    Raises:
        ConfigError: If none is found.
    """
    from numpy.random import RandomState

    for seed in range(_DEFAULT_TRIES):
        sample: dict[str, Any] = {}
        random = RandomState(seed)
        for symbol in symbols.values():
            symbol.default(sample) if seed == 0 else symbol.random(sample, random)
        try:
            check(constraints, sample)
        except InfeasibleError:
            continue
        return sample
    raise ConfigError(f"space: {_DEFAULT_TRIES} random architectures broke its constraints")


def freeze(make: Callable[[], nn.Module], sample: Mapping[str, Any]) -> nn.Module:
    """The network of a sample.

    It is made anew: `ModelSpace.freeze` refuses spaces with choices of their own.

    Args:
        make: Makes the space.
        sample: Label -> chosen value.
    """
    from nni.nas.space import model_context

    # NNI tells the nodes of every cell that it makes.
    logger = logging.getLogger("nni")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with model_context(dict(sample)):
            return make()
    finally:
        logger.setLevel(level)


def _walk(module: nn.Module, condition: Condition | None) -> Iterator[tuple[str, Condition | None]]:
    """Labels of the choices in a module, each with the innermost condition of its place."""
    from nni.nas.nn.pytorch import LayerChoice, MutableModule, Repeat

    if type(module).__name__ == "NasBench101Cell":
        yield from _walk_nasbench101(module, condition)
        return
    if isinstance(module, MutableModule):
        for mutable in module.mutables:
            for label in mutable.simplify():
                yield str(label), condition
    places: Mapping[str, Condition | None] = {}
    if isinstance(module, LayerChoice):
        places = {str(name): Condition(str(module.choice.label), (name,)) for name in module.names}
    elif isinstance(module, Repeat) and hasattr(module.depth_choice, "values"):
        places = {"blocks": Condition(str(module.depth_choice.label), tuple(module.depth_choice.values))}
    for name, child in module.named_children():
        here = places.get(name, condition)
        if isinstance(module, Repeat) and here is not condition and here is not None:
            for number, block in enumerate(child.children()):
                deeper = tuple(value for value in here.values if value > number)
                # What stands in a block of every depth matters as the whole does.
                yield from _walk(block, condition if len(deeper) == len(here.values) else replace(here, values=deeper))
        else:
            yield from _walk(child, here)


def _walk_nasbench101(cell: Any, condition: Condition | None) -> Iterator[tuple[str, Condition | None]]:
    """As `_walk`; the number of nodes says which of their operations and inputs matter."""
    count = cell.num_nodes
    yield str(count.label), condition
    for children, further in ((cell.ops, 1), (cell.inputs, 0)):
        for number, child in list(enumerate(children))[1:]:
            yield from _walk(child, Condition(str(count.label), tuple(n for n in count.values if n > number + further)))


def _united(places: list[Condition | None]) -> Condition | None:
    """The condition of something that stands in several places."""
    values: dict[Any, None] = {}
    first = places[0]
    for place in places:
        if place is None or first is None or place.label != first.label:
            return None
        values |= dict.fromkeys(place.values)
    return replace(first, values=tuple(values)) if first is not None else None
