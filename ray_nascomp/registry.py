"""Pruners, quantizers and stages of a user's own: one class and one decorator each.

A registered name is allowed in configs, appears in `compression_space`, and travels to Ray's
workers with the trainable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ray_nascomp.model_spec import GroupSpec, ModelSpec
    from ray_nascomp.tasks.base import Task


class Pruner(ABC):
    """A method of `prune.method`: it ranks the units of each group, and the lowest go."""

    @abstractmethod
    def importance(
        self, model: nn.Module, task: Task, groups: Mapping[str, GroupSpec], seed: int
    ) -> Mapping[str, Sequence[float]]:
        """How much each unit matters.

        Args:
            model: The network; it is a copy and may be changed.
            task: Data and loss.
            groups: The groups from which units are removed, by name.
            seed: For whatever is random.

        Returns:
            Group name -> importance of its units, shape `(group.width,)`, finite.
        """


class Quantizer(ABC):
    """A method of `quantize.method`: it sets the scales of weights; inputs are observed.

    Attributes:
        bits: Bits of weights that it offers, from 2 to 8; below 8 the layer computes in floating
            point from weights of so many bits.
    """

    bits: ClassVar[tuple[int, ...]] = (8,)

    @abstractmethod
    def scale(self, weight: np.ndarray, largest: int) -> np.ndarray:
        """The value of one integer step.

        Args:
            weight: A layer's weight, output channels first.
            largest: Largest magnitude of an integer weight (63 for 8 bits, 7 for 4).

        Returns:
            Scales of the output channels, shape `(weight.shape[0],)`, positive.
        """


class Stage(ABC):
    """A change of the network's structure with a section of its own in configs.

    Stages run after the architecture is built, in the plan's order; by default those of users
    come before pruning.
    """

    @abstractmethod
    def dimensions(self, spec: ModelSpec) -> dict[str, Any]:
        """The section's keys with Tune domains or constants, for `compression_space`; empty for none."""

    @abstractmethod
    def validate(self, section: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
        """The section with its defaults filled in; an empty one means that nothing is done.

        Raises:
            ConfigError: For an unknown key or a value that is not allowed.
        """

    @abstractmethod
    def apply(self, network: nn.Module, task: Task, options: Mapping[str, Any], seed: int) -> nn.Module:
        """Carries the stage out; the network may be changed in place.

        Raises:
            InfeasibleError: If it cannot be done on this network.
        """

    @abstractmethod
    def specify(self, spec: ModelSpec, options: Mapping[str, Any]) -> ModelSpec:
        """The structure that `apply` leaves, from which costs are told."""


_KINDS: dict[str, type] = {"pruner": Pruner, "quantizer": Quantizer, "stage": Stage}
_registered: dict[str, dict[str, type]] = {kind: {} for kind in _KINDS}
_Class = TypeVar("_Class", bound=type)

_RESERVED = frozenset(
    {"architecture", "low_rank", "prune", "finetune", "quantize", "order", "extra", "stages"}
    | {"l1_norm", "l2_norm", "fpgm", "taylor", "slim", "movement", "level", "movement_level", "one_shot"}
    | {"ptq", "qat", "lsq", "lsq_plus", "dorefa", "bnn"}
)


def register(name: str) -> Callable[[_Class], _Class]:
    """Decorator for a subclass of `Pruner`, `Quantizer` or `Stage`, made known under a name.

    Registering a name again replaces what it stood for.

    Raises:
        ConfigError: If the name is one of ours or not an identifier, or the class is something else.
    """
    if name in _RESERVED or not name.isidentifier():
        raise ConfigError(f"register: {name!r} was given; an identifier that is none of ours is allowed")

    def decorate(cls: _Class) -> _Class:
        for kind, base in _KINDS.items():
            if isinstance(cls, type) and issubclass(cls, base):
                _registered[kind][name] = cls
                return cls
        raise ConfigError(f"register({name!r}): {cls!r} was given; a Pruner, a Quantizer or a Stage is allowed")

    return decorate


def registered(kind: str) -> dict[str, Any]:
    """Name -> class of what users have registered: kind is "pruner", "quantizer" or "stage"."""
    return dict(_registered[kind])


def snapshot() -> dict[str, dict[str, type]]:
    """All that is registered, to travel to another process."""
    return {kind: dict(classes) for kind, classes in _registered.items()}


def install(entries: Mapping[str, Mapping[str, type]]) -> None:
    """Registers what `snapshot` has taken elsewhere."""
    for kind, classes in entries.items():
        _registered[kind].update(classes)
