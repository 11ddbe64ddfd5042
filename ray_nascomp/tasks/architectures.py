"""The architectures of a task: networks with inherited weights, and the structure of each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import nn

from ray_nascomp.errors import ConfigError, InfeasibleError, UntraceableModelError
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.space import Space
from ray_nascomp.tasks.calling import device_of

Build = Callable[[dict[str, Any]], nn.Module]


class Architectures:
    """What a builder makes of a model; an empty architecture is the model itself.

    Args:
        model: The trained model.
        build: The builder, if there is one.
        dimensions: Its dimensions, Tune domains by name.
        example_inputs: Inputs that networks are traced with.
    """

    def __init__(
        self, model: nn.Module, build: Build | None, dimensions: Mapping[str, Any], example_inputs: Any
    ) -> None:
        self._model = model
        self._build = build
        self._dimensions = dimensions
        self._example_inputs = example_inputs
        # Conditions name their dimension by its place in the whole space, which begins with the stage.
        self._space = Space({"architecture": dimensions}) if dimensions else None

    @cached_property
    def spec(self) -> ModelSpec:
        """The structure of the model itself.

        Raises:
            UntraceableModelError: If it does not run on the example inputs.
        """
        return ModelSpec.from_model(self._model, self._example_inputs)

    def network(self, architecture: Mapping[str, Any]) -> nn.Module:
        """A fresh network, with the weights that it inherits.

        Raises:
            ConfigError: For unknown or missing keys, or an architecture where there is no builder.
        """
        from ray_nascomp.architecture.inherit import inherit_weights
        from ray_nascomp.compression.plain_layers import use_plain_layers, with_plain_weights

        if not architecture:
            network = copy.deepcopy(self._model)
            use_plain_layers(network)
            return network
        if self._build is None or self._space is None:
            raise ConfigError(f"architecture: {dict(architecture)!r} was given, but the task has no builder")
        for key in architecture:
            if key not in self._dimensions:
                raise ConfigError.unknown("architecture", key, self._dimensions)
        network = self._build(self._canonical(architecture))
        if not isinstance(network, nn.Module):
            raise ConfigError(f"build: it returned a {type(network).__name__}, a torch.nn.Module is allowed")
        network = with_plain_weights(network)
        if not getattr(self._build, "inherits", False):
            inherit_weights(network, self._model)
        use_plain_layers(network)
        return network.to(device_of(self._model))

    def trace(self, architecture: Mapping[str, Any]) -> tuple[nn.Module, ModelSpec]:
        """The network of `network`, and its structure.

        Raises:
            InfeasibleError: If the network does not run on the example inputs.
        """
        network = self.network(architecture)
        if not architecture:
            return network, self.spec
        if self._specs is not None:
            return network, self._specs(self._canonical(architecture))
        try:
            return network, ModelSpec.from_model(network, self._example_inputs)
        except UntraceableModelError as error:
            raise InfeasibleError(f"architecture {dict(architecture)}: {error}") from error

    def spec_of(self, architecture: Mapping[str, Any]) -> ModelSpec:
        """The structure of an architecture's network, which is built only where its builder cannot tell it.

        Raises:
            InfeasibleError: If the network does not run on the example inputs.
        """
        if self._specs is not None and architecture:
            return self._specs(self._canonical(architecture))
        return self.trace(architecture)[1]

    def without_weights(self) -> Architectures:
        """The same for keys and structures alone, which holds no weights but those of a builder that is needed."""
        knows = self._specs is not None
        light = copy.copy(self)
        if knows:
            light._build = None
        light._model = nn.Identity()
        return light

    def key(self, architecture: Mapping[str, Any]) -> str:
        """A text that equal architectures share, inactive dimensions left out."""
        if not architecture or self._space is None:
            return ""
        return json.dumps(self._canonical(architecture), sort_keys=True, default=str)

    @cached_property
    def _specs(self) -> Callable[[Mapping[str, Any]], ModelSpec] | None:
        """What tells structures from architectures, if the builder knows."""
        make = getattr(self._build, "specs", None)
        return make(self.spec) if make is not None else None

    def _canonical(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        assert self._space is not None
        canonical: dict[str, Any] = self._space.canonical({"architecture": architecture})["architecture"]
        return canonical
