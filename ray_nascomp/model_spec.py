"""What is known of a model without its weights: layers, coupled groups, shapes, operations.

Everything that reasons about a model without running it (spaces, costs, reports) reads a
`ModelSpec`. It is made once by tracing the model (`ray_nascomp.compression.trace`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

LayerKind = Literal["conv", "depthwise_conv", "linear", "embedding", "recurrent", "batch_norm", "norm", "other"]


@dataclass(frozen=True)
class LayerSpec:
    """One leaf module that holds parameters.

    Attributes:
        name: Dotted module name.
        kind: What the layer is.
        weight_shape: Shape of `weight` as torch has it; of recurrent layers, that of the first layer's
            weights for its inputs, both directions together; for "other" empty.
        bias: Whether there is a bias, one value an output channel.
        positions: Output positions of one sample: pixels or tokens, summed over calls; 0 for a layer that
            is never called, whose output is never used, or that shares its weight, which then counts in
            `ModelSpec.extra_macs`.
        fixed_params: Parameters that no group changes ("other", "recurrent").
        out_group: Group whose units the output channels belong to, for layers that produce them.
        out_per_unit: Output channels for each unit of that group.
        in_groups: Pairs (group, inputs for each of its units) that make up the input channels; for
            normalisations, embeddings and depthwise convolutions of several groups, the channels that they pass on.
        in_positions: Input positions of one sample, for convolutions.
        folds_into: For a batch normalisation, the convolution that it merges with on export.
        factorisable: Whether the layer can be replaced by one of low rank.
        origin: Name that the layer's values have in configs; that of the layer which it is a factor of.
        makes_weight: Whether it multiplies by what it makes of its weight, such as a standardised one, which has
            no integers then.
        is_constant: Whether a linear layer or convolution is given the same whatever the model's inputs are, such as a
            table of positions. Exported files may have the product in its place: it gets neither a rank nor bits.
    """

    name: str
    kind: LayerKind
    weight_shape: tuple[int, ...]
    bias: bool
    positions: int = 1
    fixed_params: int = 0
    out_group: str | None = None
    out_per_unit: int = 1
    in_groups: tuple[tuple[str, int], ...] = ()
    in_positions: int = 0
    folds_into: str | None = None
    factorisable: bool = False
    origin: str = ""
    makes_weight: bool = False
    is_constant: bool = False

    @property
    def is_compressible(self) -> bool:
        """Whether the layer multiplies by a weight that can be quantized."""
        return self.kind in ("conv", "depthwise_conv", "linear") and self.positions > 0

    @property
    def is_quantizable(self) -> bool:
        """Whether bits can be given for the layer: where it multiplies, and for tables and recurrent layers."""
        return (self.is_compressible and not self.makes_weight and not self.is_constant) or (
            self.kind in ("embedding", "recurrent") and self.positions > 0
        )

    @property
    def config_name(self) -> str:
        """The layer's name in configs."""
        return self.origin or self.name


@dataclass(frozen=True)
class GroupSpec:
    """Layers whose output channels are tied, pruned together.

    A group's units are what is removed from it: single channels, or whole attention heads (with
    grouped queries, a key-value head and all queries that share it).

    Attributes:
        name: Name of the first layer of the group; of an attention's heads, the attention module's.
        width: Number of units.
        layers: Names of the convolutions and linear layers that produce the channels.
        prunable: Whether units can be removed without changing the model's output shape.
        unit: Columns that a unit has in the weight of `columns_of`; 1 for channels.
        columns_of: For attention heads, the output projection: the layer whose input columns are
            compared to choose heads; None for channels, chosen by the rows of `layers`.
        macs_per_unit: Multiply-accumulates of one sample that a unit takes outside of layers
            (attention products).
    """

    name: str
    width: int
    layers: tuple[str, ...]
    prunable: bool
    unit: int = 1
    columns_of: str | None = None
    macs_per_unit: int = 0

    @property
    def is_heads(self) -> bool:
        """Whether the units are attention heads."""
        return self.columns_of is not None


@dataclass(frozen=True)
class ModelSpec:
    """The structure of a model, without weights.

    Attributes:
        layers: All layers with parameters, in the model's order.
        groups: All groups of coupled channels, in the model's order.
        extra_params: Parameters that belong to no leaf layer.
        extra_macs: Multiply-accumulates of one sample outside of layers and groups (recurrent layers,
            attention products of heads that cannot be removed).
    """

    layers: tuple[LayerSpec, ...]
    groups: tuple[GroupSpec, ...]
    extra_params: int = 0
    extra_macs: int = 0

    @classmethod
    def from_model(cls, model: nn.Module, example_inputs: Any) -> ModelSpec:
        """Traces the model; its weights are left as they are.

        Args:
            model: Any module that runs on the example.
            example_inputs: A tensor, a tuple or a dict, batch first.

        Raises:
            UntraceableModelError: If the model does not run on the example.
        """
        from ray_nascomp.compression.trace import trace_model

        return trace_model(model, example_inputs)

    @property
    def prunable_groups(self) -> tuple[GroupSpec, ...]:
        """The groups that a sparsity can be given for."""
        return tuple(group for group in self.groups if group.prunable)

    @property
    def compressible_layers(self) -> tuple[LayerSpec, ...]:
        """The convolutions and linear layers."""
        return tuple(layer for layer in self.layers if layer.is_compressible)

    @property
    def quantizable_layers(self) -> tuple[LayerSpec, ...]:
        """The layers that bits can be given for."""
        return tuple(layer for layer in self.layers if layer.is_quantizable)

    @cached_property
    def prunable_names(self) -> dict[str, None]:
        """Names of the groups that a sparsity can be given for, in order."""
        return dict.fromkeys(group.name for group in self.prunable_groups)

    @cached_property
    def quantizable_names(self) -> dict[str, None]:
        """Names of the layers that bits can be given for, in order."""
        return dict.fromkeys(layer.name for layer in self.quantizable_layers)

    @cached_property
    def factorisable_names(self) -> dict[str, None]:
        """Names of the layers that a rank can be given for, in order."""
        return dict.fromkeys(layer.name for layer in self.layers if layer.factorisable)

    def group_of(self, layer: str) -> GroupSpec | None:
        """The group that a layer's output channels belong to."""
        return next((group for group in self.groups if layer in group.layers), None)

    def to_json(self) -> str:
        """The spec as JSON text, a few kilobytes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The spec of `to_json`."""
        data = json.loads(text)
        layers = tuple(
            LayerSpec(
                **{
                    **layer,
                    "weight_shape": tuple(layer["weight_shape"]),
                    "in_groups": tuple((group, count) for group, count in layer["in_groups"]),
                }
            )
            for layer in data["layers"]
        )
        groups = tuple(GroupSpec(**{**group, "layers": tuple(group["layers"])}) for group in data["groups"])
        return cls(layers, groups, data["extra_params"], data["extra_macs"])
