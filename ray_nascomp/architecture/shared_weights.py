"""Sub-networks whose weights are slices of one network's, so that training them trains it.

Which entries a sub-network takes is read off a network that holds the number of each entry in
place of its weight: what a builder slices, crops or renames, is then known, whatever the builder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ray_nascomp.architecture.inherit import inherit_weights
from ray_nascomp.errors import ConfigError

Slice = Callable[[list[nn.Parameter]], Tensor]
_NOT_INHERITED = -1.0


class SharedNetwork:
    """A sub-network that is called as a module is; its parameters are slices of another network's.

    Args:
        skeleton: The sub-network; its own parameters are emptied.
        slices: Name of a parameter -> what takes it from the list of the whole network's.
        whole: The whole network's parameters.
    """

    def __init__(self, skeleton: nn.Module, slices: Mapping[str, Slice], whole: list[nn.Parameter]) -> None:
        self._skeleton = skeleton.train()
        self._slices = slices
        self._whole = whole
        for parameter in skeleton.parameters():
            parameter.data = parameter.data.new_empty(0)

    def parameters(self) -> dict[str, Tensor]:
        """The sub-network's parameters by name, through which gradients reach the whole network's."""
        return {name: take(self._whole) for name, take in self._slices.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The sub-network's output, in training mode."""
        return functional_call(self._skeleton, self.parameters(), args, kwargs)


class SharedWeights:
    """One network's weights, and how a builder's sub-networks share them.

    Args:
        network: The whole network; its parameters are shared.
        build: The builder of a task (see `Task`).
    """

    def __init__(self, network: nn.Module, build: Any) -> None:
        self._whole = list(network.parameters())
        self._original = self._build = build
        self._starts = list(accumulate((parameter.numel() for parameter in self._whole), initial=0))
        numbered = copy.deepcopy(network).cpu()
        for parameter, start in zip(numbered.parameters(), self._starts, strict=False):
            # Whole numbers are exact in these up to 2**53.
            parameter.data = torch.arange(start, start + parameter.numel(), dtype=torch.float64).view(parameter.shape)
        self._numbered = numbered
        self._numbers = [parameter.data for parameter in numbered.parameters()]
        self._inherits = bool(getattr(build, "inherits", False))
        if self._inherits:
            self._build = rebased(build, numbered)

    def network(self, architecture: dict[str, Any]) -> SharedNetwork:
        """The sub-network of an architecture.

        Raises:
            ConfigError: If it has a parameter that is no part of the whole network's.
        """
        skeleton = self._build(architecture)
        if not self._inherits:
            for parameter in skeleton.parameters():
                parameter.data = torch.full(parameter.shape, _NOT_INHERITED, dtype=torch.float64)
            inherit_weights(skeleton, self._numbered)
        slices = {name: self._slice(name, parameter.data) for name, parameter in skeleton.named_parameters()}
        device = self._whole[0].device
        for buffer_name, buffer in list(skeleton.named_buffers()):
            owner, _, child = buffer_name.rpartition(".")
            skeleton.get_submodule(owner)._buffers[child] = buffer.to(device)
        return SharedNetwork(skeleton, slices, self._whole)

    def check(self, architecture: dict[str, Any], model: nn.Module) -> None:
        """Compares a sub-network with the one that the builder makes of the same weights.

        Args:
            architecture: The sub-network.
            model: A model with the whole network's weights.

        Raises:
            ConfigError: If they differ, as where the builder does more than to take parts of weights.
        """
        built = self._original(architecture) if self._inherits else self._build(architecture)
        if not self._inherits:
            inherit_weights(built, model)
        shared = self.network(architecture).parameters()
        for name, parameter in built.named_parameters():
            if name not in shared or not torch.equal(shared[name].detach().cpu(), parameter.detach().cpu()):
                raise ConfigError(
                    f"build: the parameter {name!r} of a sub-network is more than a part of one of the model's, which "
                    "shared weights cannot follow"
                )

    def _slice(self, name: str, numbers: Tensor) -> Slice:
        """What takes the entries of these numbers, in their shape."""
        owner = self._owner(int(numbers.flatten()[0])) if numbers.numel() else 0
        if torch.equal(numbers, self._numbers[owner]):
            return lambda whole: whole[owner]
        ids = numbers.long()
        start, stop = self._starts[owner : owner + 2]
        if not torch.equal(ids.double(), numbers) or ids.numel() == 0 or ids.min() < start or ids.max() >= stop:
            raise ConfigError(
                f"build: the parameter {name!r} of a sub-network is no part of one of the model's; shared weights need "
                "a model that holds all of its architectures"
            )
        ids -= start
        shape = self._whole[owner].shape
        device = self._whole[owner].device
        axes = _axes(ids, shape)
        if axes is None:
            places = ids.to(device)
            return lambda whole: whole[owner].flatten()[places]
        chosen = {axis: places.to(device) for axis, places in axes.items()}

        def take(whole: list[nn.Parameter]) -> Tensor:
            value: Tensor = whole[owner]
            for axis, places in chosen.items():
                value = value.index_select(axis, places)
            return value

        return take

    def _owner(self, number: int) -> int:
        """Which parameter an entry belongs to."""
        inside = [start <= number < stop for start, stop in zip(self._starts, self._starts[1:], strict=False)]
        return inside.index(True) if any(inside) else 0


def rebased(build: Any, model: nn.Module) -> Any:
    """A builder that brings weights itself, on other weights of the same model.

    Raises:
        ConfigError: If the builder offers no such form of itself.
    """
    if not hasattr(build, "with_model"):
        raise ConfigError(
            f"build: a {type(build).__name__} brings weights itself but has no method with_model(model), which a "
            "supernet needs"
        )
    return build.with_model(model)


def _axes(ids: Tensor, shape: torch.Size) -> dict[int, Tensor] | None:
    """Axis -> indices along it, of a selection of rows, columns and so on; None for any other."""
    if ids.dim() != len(shape):
        return None
    axes: dict[int, Tensor] = {}
    for axis, places in enumerate(torch.unravel_index(ids, shape)):
        line = places[tuple(slice(None) if other == axis else 0 for other in range(len(shape)))]
        if not torch.equal(
            places, line.view([-1 if other == axis else 1 for other in range(len(shape))]).expand_as(ids)
        ):
            return None
        if not torch.equal(line, torch.arange(shape[axis])):
            axes[axis] = line.clone()
    return axes
