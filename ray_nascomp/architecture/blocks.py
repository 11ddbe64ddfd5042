"""A transformer's blocks: which layers are attention, which feed-forward, and how whole blocks are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ray_nascomp.compression.attention import Attention, find_attentions, keep_inputs, keep_outputs

_FEED_FORWARDS = (
    (("intermediate.dense",), "output.dense"),
    (("intermediate_dense",), "output_dense"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("ffn",), "ffn_output"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
)
"""Names of the layers that widen, and of the one that narrows again."""
_STACK_LENGTHS = {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"}
"""Fields of a config that count the blocks of one stack among several: T5."""


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers with neurons between them, or three where a gate multiplies the neurons.

    Attributes:
        expand: Names of the layers whose outputs are the neurons.
        contract: Name of the layer that reads the neurons.
        width: Number of neurons.
    """

    expand: tuple[str, ...]
    contract: str
    width: int

    def keep(self, model: nn.Module, neurons: list[int]) -> None:
        """Keeps these neurons in place, in ascending order."""
        for name in self.expand:
            keep_outputs(model.get_submodule(name), neurons)
        keep_inputs(model.get_submodule(self.contract), neurons)


@dataclass(frozen=True)
class Block:
    """One of the alike layers that a transformer stacks.

    Attributes:
        stack: Name of the list that holds it.
        key: Its name in that list: its number in the whole model.
        attentions: Its attentions, in the order of the model; coupled ones stand in the first block.
        feed_forward: Its feed-forward layers, if it has any that are known.
    """

    stack: str
    key: str
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward | None

    @property
    def name(self) -> str:
        """Dotted name of the block."""
        return f"{self.stack}.{self.key}"


class KeptLayers(nn.ModuleList):
    """Layers of a list under the numbers that they had in the whole list, so that their names tell what they are."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for key, layer in layers.items():
            self.add_module(key, layer)

    def __getitem__(self, index: Any) -> Any:
        layers = list(self._modules.values())
        return nn.ModuleList(layers[index]) if isinstance(index, slice) else layers[index]


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The blocks of a model of transformers, in its order; empty where no attention is known."""
    attentions = find_attentions(model)
    owners: dict[tuple[str, str], list[Attention]] = {}
    for attention in attentions:
        for member in attention.members:
            place = _place(model, member.name)
            if place is not None:
                owners.setdefault(place, []).extend([attention] if member is attention else [])
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return tuple(
        Block(stack, key, tuple(found), _feed_forward(model, f"{stack}.{key}"))
        for (stack, key), found in sorted(owners.items(), key=lambda item: order[".".join(item[0])])
    )


def drop_blocks(model: nn.Module, names: set[str]) -> None:
    """Leaves blocks out, in place; those that stay keep their names.

    Args:
        model: The model.
        names: Names of blocks; of each stack at least one has to stay.
    """
    stacks = {name.rpartition(".")[0] for name in names}
    for stack in stacks:
        layers = dict(model.get_submodule(stack).named_children())
        kept = {key: layer for key, layer in layers.items() if f"{stack}.{key}" not in names}
        places = [list(layers).index(key) for key in kept]
        parent, _, child = stack.rpartition(".")
        setattr(model.get_submodule(parent), child, KeptLayers(kept))
        for number, layer in enumerate(kept.values()):
            inner: Any
            for inner in layer.modules():
                for key in ("layer_idx", "layer_id"):  # A cache has a place for each layer.
                    if hasattr(inner, key):
                        setattr(inner, key, number)
        for config in _configs(model, stack):
            set_stack_length(config, stack, len(kept))
            for field in ("layer_types", "attention_layers"):
                kinds = getattr(config, field, None)
                if isinstance(kinds, list) and len(kinds) == len(layers):
                    setattr(config, field, [kinds[place] for place in places])
            if hasattr(config, "attention_types"):  # GPT-Neo tells its kinds of layers twice.
                config.attention_types = [[config.attention_layers, 1]]


def set_stack_length(config: Any, stack: str, length: int) -> None:
    """Writes a stack's number of blocks into a config, for one stage of several into that stage's place."""
    stages_above = re.findall(r"\.(\d+)\.", stack)
    depths = getattr(config, "depths", None)
    if stages_above and isinstance(depths, list):
        config.depths = [length if str(stage) == stages_above[-1] else depth for stage, depth in enumerate(depths)]
        return
    field = next((field for ending, field in _STACK_LENGTHS.items() if stack.endswith(ending)), "num_hidden_layers")
    for side in ("encoder", "decoder"):
        if f"{side}." in stack and hasattr(config, f"{side}_layers"):
            field = f"{side}_layers"
    field = field if hasattr(config, field) else "num_hidden_layers"
    stages = getattr(config, "stage_names", None) or ()
    is_backbone = len(stages) - 1 == getattr(config, field, None)
    setattr(config, field, length)
    if is_backbone:  # It names its layers, and those whose outputs it gives: the last one.
        config.stage_names = stages[: length + 1]
        config.set_output_features_output_indices(None, None)


def _configs(model: nn.Module, stack: str) -> Iterator[Any]:
    """The model's config, and that of the module around the stack where it has its own."""
    seen: list[Any] = []
    for module in (model, model.get_submodule(stack.rpartition(".")[0])):
        config = getattr(module, "config", None)
        if config is not None and not any(config is other for other in seen):
            seen.append(config)
            yield config


def _place(model: nn.Module, name: str) -> tuple[str, str] | None:
    """The innermost list of alike layers that a module stands in, and its key there; T5's blocks list unlike ones."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        stack = model.get_submodule(".".join(parts[:end]))
        if isinstance(stack, nn.ModuleList) and len({type(layer) for layer in stack}) == 1:
            return ".".join(parts[:end]), parts[end]
    return None


def _feed_forward(model: nn.Module, block: str) -> FeedForward | None:
    for name, _ in model.get_submodule(block).named_modules(prefix=block):
        for expand, contract in _FEED_FORWARDS:
            paths = [f"{name}.{child}" for child in (*expand, contract)]
            layers = [_submodule(model, path) for path in paths]
            if all(layer is not None for layer in layers):
                width, outputs = _widths(layers[-1])
                fits = all(_widths(layer)[1] == width for layer in layers[:-1])
                if fits and (width == outputs or not _has_channels(model.get_submodule(name), width)):
                    return FeedForward(tuple(paths[:-1]), paths[-1], width)
    return None


def _has_channels(module: nn.Module, width: int) -> bool:
    """Whether a convolution or a normalisation within has so many channels: SegFormer's between its linear layers."""
    weights = (getattr(layer, "weight", None) for layer in module.modules() if not _is_linear(layer))
    return any(weight is not None and weight.shape[0] == width for weight in weights)


def _submodule(model: nn.Module, path: str) -> Any:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module if _is_linear(module) else None


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _widths(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer or a Conv1D."""
    outputs, inputs = layer.weight.shape if isinstance(layer, nn.Linear) else reversed(layer.weight.shape)
    return int(inputs), int(outputs)
