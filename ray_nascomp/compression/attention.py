"""Attention heads: where a transformer keeps them, and their exact removal.

Heads are sliced directly, without tracing: a whole query, key and value block goes with its
columns of the output projection, as Michel, Levy and Neubig (2019, arXiv 1905.10650) prune
heads. With grouped queries (Ainslie et al. 2023, arXiv 2305.13245) the unit is a key-value head
with all query heads that read it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ray_nascomp.compression.multihead import SplitAttention
from ray_nascomp.errors import ConfigError

_HEAD_DIM_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_HEAD_COUNT_NAMES = ("num_attention_heads", "num_heads", "n_heads")
_WIDTH_NAMES = ("all_head_size", "inner_dim", "split_size")
HEAD_ATTRIBUTES = frozenset((*_HEAD_DIM_NAMES, *_HEAD_COUNT_NAMES, *_WIDTH_NAMES, "num_key_value_heads"))
"""Names of the numbers of an attention module that tell its heads."""
_PROJECTIONS = (
    ("query", "key", "value", "output.dense"),
    ("query", "key", "value", "dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("q", "k", "v", "o"),
    ("query_proj", "key_proj", "value_proj", "output.dense"),
    ("c_attn", "c_attn", "c_attn", "c_proj"),
    ("q_attn", "c_attn", "c_attn", "c_proj"),
    ("Wqkv", "Wqkv", "Wqkv", "Wo"),
    ("query_key_value", "query_key_value", "query_key_value", "dense"),
)
"""Names of the query, key, value and output layers; names with a dot stand beside the module."""
_POSITIONS = ("pos_query_proj", "pos_key_proj")
"""Names of layers that make queries and keys of relative positions."""
_BIASES_AROUND = ("relative_position_bias", "shared_position_bias")
"""Names of what makes a bias for each head in the modules around an attention."""
_OWN_PRODUCTS = (
    "DisentangledSelfAttention",
    "GPTJAttention",
    "GPTNeoSelfAttention",
    "MobileViTSelfAttention",
    "MPNetSelfAttention",
    "RoFormerSelfAttention",
)
"""Classes of transformers that multiply queries and keys themselves, as many heads as their numbers tell."""


@dataclass(frozen=True)
class Attention:
    """Heads that can be removed together with their rows and columns.

    Attributes:
        name: Dotted name of the attention module.
        heads: Number of query heads.
        kv_heads: Number of key and value heads; each serves `heads // kv_heads` query heads.
        head_dim: Channels of a head.
        query: Name of the layer that makes the queries. Where one layer makes queries, keys and
            values (GPT-2, GPT-NeoX, ModernBERT), it is the name of all three.
        key: Name of the layer that makes the keys.
        value: Name of the layer that makes the values.
        output: Name of the layer that the heads' outputs go into.
        interleaved: Whether such a layer gives each head's query, key and value next to each other
            (GPT-NeoX) rather than all queries before all keys and values (GPT-2).
        positions: Names of further layers with rows for each head, as the keys have (DeBERTa).
        position_bias: Name of an embedding with one column a head (T5, MPNet), or None.
        coupled: Further attentions that lose the same heads as this one: T5 and MPNet compute their
            position bias once for all layers of a stack.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    query: str
    key: str
    value: str
    output: str
    interleaved: bool = False
    positions: tuple[str, ...] = ()
    position_bias: str | None = None
    coupled: tuple[Attention, ...] = ()

    @property
    def units(self) -> int:
        """Number of heads that can be removed one by one: key-value heads with their queries."""
        return self.kv_heads

    @property
    def members(self) -> tuple[Attention, ...]:
        """The attention itself and those coupled with it."""
        return (self, *self.coupled)

    def rows(self, units: Iterable[int]) -> dict[str, list[int]]:
        """Output rows that these units have in the layers that make queries, keys and values.

        Args:
            units: Indices of units, 0 to `units - 1`.

        Returns:
            Layer name -> ascending row indices, of this and the coupled attentions.
        """
        chosen = sorted(units)
        rows: dict[str, list[int]] = {}
        for member in self.members:
            if member.interleaved:
                rows[member.query] = _blocks(chosen, 3 * self.head_dim)
                continue
            offset: dict[str, int] = {}
            for layer, size, heads in (
                (member.query, member._unit_width, self.heads),
                (member.key, self.head_dim, self.kv_heads),
                (member.value, self.head_dim, self.kv_heads),
            ):
                start = offset.get(layer, 0)
                rows.setdefault(layer, []).extend(start + row for row in _blocks(chosen, size))
                offset[layer] = start + heads * self.head_dim
            rows |= dict.fromkeys(member.positions, rows[member.key])
        return rows

    def columns(self, units: Iterable[int]) -> dict[str, list[int]]:
        """Input columns that these units have in the output layers: layer name -> ascending indices."""
        chosen = sorted(units)
        return {member.output: _blocks(chosen, self._unit_width) for member in self.members}

    @property
    def _unit_width(self) -> int:
        return self.heads // self.kv_heads * self.head_dim


def find_attentions(model: nn.Module) -> tuple[Attention, ...]:
    """The model's attentions in its own order; of coupled ones the first, which names the others.

    Found are modules that go through the attention interface of `transformers` with separate
    layers for queries, keys and values, or a fused one: BERT, RoBERTa, DistilBERT, ALBERT,
    ModernBERT, ViT, Wav2Vec2, Whisper, BART, T5, GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Phi and
    their like; DeBERTa-v2, RoFormer, MPNet, MobileViT, GPT-Neo and GPT-J; and what
    `multihead.split_attentions` puts in the place of `nn.MultiheadAttention`. A module with further
    parameters for each head, or with a mask for each head from outside, is left out, as nothing is
    known of what they do.
    """
    found: dict[str, Attention] = {}
    stacks: dict[str, str] = {}
    for name, module in model.named_modules():
        attention = _attention(model, name, module)
        if attention is None:
            continue
        stack = re.sub(r"\.\d+\.", ".*.", name) if _has_position_bias(module) else name
        first = stacks.setdefault(stack, name)
        if first == name:
            found[name] = replace(attention, position_bias=_position_bias(model, name))
        else:
            found[first] = replace(found[first], coupled=(*found[first].coupled, attention))
    return tuple(found.values())


def attentions_left_whole(model: nn.Module, found: Iterable[Attention]) -> dict[str, nn.Module]:
    """What looks like attention and is not among those found, by name.

    Args:
        model: The model.
        found: Its attentions, of `find_attentions`.
    """
    known = {member.name for attention in found for member in attention.members}
    return {
        name: module
        for name, module in model.named_modules()
        if name not in known
        and any(isinstance(getattr(module, key, None), int) for key in (*_HEAD_COUNT_NAMES, *_HEAD_DIM_NAMES))
        and sum(isinstance(child, nn.Linear) or _is_conv1d(child) for child in module.children()) > 1
    }


def remove_heads(model: nn.Module, attention: Attention, units: Iterable[int]) -> None:
    """Removes heads in place; the rest of the model computes what it did.

    The output equals that of the model with the removed heads' columns of the output layer set
    to zero. The model's `config` still has the old number of heads.

    Args:
        model: The model that the attention was found in.
        attention: One of `find_attentions(model)`, as the model is now.
        units: Indices of the units to remove, 0 to `attention.units - 1`.

    Raises:
        ConfigError: If a unit does not exist, or none would stay.
    """
    removed = set(units)
    if not removed <= set(range(attention.units)):
        raise ConfigError(
            f"{attention.name}: heads {sorted(removed)} were given; 0 to {attention.units - 1} are allowed"
        )
    if len(removed) == attention.units:
        raise ConfigError(f"{attention.name}: all {attention.units} heads were to be removed; one has to stay")
    kept = [unit for unit in range(attention.units) if unit not in removed]
    for layer, rows in attention.rows(kept).items():
        keep_outputs(model.get_submodule(layer), rows)
    for layer, columns in attention.columns(kept).items():
        keep_inputs(model.get_submodule(layer), columns)
    heads = attention.heads // attention.kv_heads * len(kept)
    for member in attention.members:
        module = model.get_submodule(member.name)
        values = dict.fromkeys(_HEAD_COUNT_NAMES, heads) | dict.fromkeys(_WIDTH_NAMES, heads * attention.head_dim)
        values["num_key_value_heads"] = len(kept)
        for attribute, value in values.items():
            if hasattr(module, attribute):
                setattr(module, attribute, value)
        if isinstance(module, SplitAttention):
            module.keep_heads(kept)
        if member.position_bias is not None:
            embedding: Any = model.get_submodule(member.position_bias)
            embedding.weight = _select(embedding.weight, kept, 1)
            embedding.embedding_dim = len(kept)


def replace_conv1d(model: nn.Module) -> None:
    """Replaces every `Conv1D` of transformers (GPT-2), a linear layer stored transposed, by `nn.Linear` in place."""
    conv1d_layers: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if _is_conv1d(m)]
    for name, module in conv1d_layers:
        inputs, outputs = module.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=module.weight.requires_grad)
        linear.bias = module.bias
        linear.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)


def keep_outputs(layer: Any, rows: list[int]) -> None:
    """Keeps these output channels of an `nn.Linear` or a `Conv1D`, in this order, in place."""
    layer.weight = _select(layer.weight, rows, 1 if _is_conv1d(layer) else 0)
    if layer.bias is not None:
        layer.bias = _select(layer.bias, rows, 0)
    setattr(layer, "nf" if _is_conv1d(layer) else "out_features", len(rows))


def keep_inputs(layer: Any, columns: list[int]) -> None:
    """Keeps these input channels of an `nn.Linear` or a `Conv1D`, in this order, in place."""
    layer.weight = _select(layer.weight, columns, 0 if _is_conv1d(layer) else 1)
    setattr(layer, "nx" if _is_conv1d(layer) else "in_features", len(columns))


def _attention(model: nn.Module, name: str, module: nn.Module) -> Attention | None:
    head_dim = next((value for key in _HEAD_DIM_NAMES if isinstance(value := getattr(module, key, None), int)), None)
    if not head_dim or not _is_known(module) or _has_masks_from_outside(model, name):
        return None
    layers = _projections(model, name, module)
    if layers is None:
        return None
    query, key, value, output = layers
    widths = [_features(model.get_submodule(layer), inputs=layer == output) for layer in layers]
    # A fused layer's rows are shared out among the projections that it makes.
    shares = [1] * 3
    if query == key:
        shares = [3] * 3
    elif key == value:
        shares = [1, 2, 2]
    heads, kv_heads, value_heads = (width // share // head_dim for width, share in zip(widths[:3], shares, strict=True))
    if widths[3] != heads * head_dim or value_heads != kv_heads or not kv_heads or heads % kv_heads:
        return None
    positions = [f"{name}.{child}" for child in _POSITIONS if _is_linear(getattr(module, child, None))]
    owned = {layer.removeprefix(f"{name}.") for layer in (*layers, *positions)}
    owned |= {f"{layer}.{child}" for layer in owned for child, _ in _submodule_children(module, layer)}
    owned |= {"LayerNorm"} if "dense" in owned else set()  # ALBERT's comes after the output layer.
    owned |= {"relative_attention_bias"} if _has_position_bias(module) else set()
    for parameter_name, parameter in module.named_parameters():
        owner = parameter_name.rpartition(".")[0]
        if owner not in owned and parameter.numel() != head_dim:
            return None
    interleaved = query.endswith("query_key_value")
    query, key, value, *positions = (_factor(model, layer, -1) for layer in (query, key, value, *positions))
    output = _factor(model, output, 0)
    return Attention(name, heads, kv_heads, head_dim, query, key, value, output, interleaved, tuple(positions))


def _projections(model: nn.Module, name: str, module: nn.Module) -> tuple[str, str, str, str] | None:
    for names in _PROJECTIONS:
        if names[0] == "q" and not _has_position_bias(module):
            continue
        if names[0] == "c_attn" and hasattr(module, "q_attn"):
            continue
        places = [name.rpartition(".")[0] if "." in child else name for child in names]
        paths = [f"{place}.{child}".lstrip(".") for place, child in zip(places, names, strict=True)]
        if all(_is_linear(_submodule(model, path)) for path in paths):
            return paths[0], paths[1], paths[2], paths[3]
    return None


def _submodule_children(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    found = _submodule(module, path)
    return list(found.named_children()) if found is not None else []


def _factor(model: nn.Module, name: str, index: int) -> str:
    """The name of a low-rank layer's first or last factor; a whole layer's own name."""
    layer = model.get_submodule(name)
    return f"{name}.{index % len(layer)}" if isinstance(layer, nn.Sequential) else name


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, SplitAttention) or type(module).__name__ in _OWN_PRODUCTS:
        return True
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return False
    counts = {"num_attention_heads", "num_key_value_heads"}.intersection(code.co_names)
    if not all(hasattr(module, name) for name in counts):  # The config tells one number for all layers: Moonshine.
        return False
    # A bias for each head that comes from outside would keep the removed heads.
    outside = [name for name in inspect.signature(forward).parameters if "bias" in name or name.startswith("rel_")]
    return not outside or _has_position_bias(module)


def _has_masks_from_outside(model: nn.Module, name: str) -> bool:
    """Whether a module around an attention adds a bias for each head to its mask: BEiT."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    return any(getattr(module, key, None) is not None for module in around for key in _BIASES_AROUND)


def _has_position_bias(module: nn.Module) -> bool:
    """Whether all attentions of a stack share a bias with one column a head."""
    return hasattr(module, "has_relative_attention_bias") or type(module).__name__ == "MPNetSelfAttention"


def _position_bias(model: nn.Module, name: str) -> str | None:
    """The embedding of that bias: in the first attention (T5), or beside the list of blocks (MPNet)."""
    paths = (f"{name}.relative_attention_bias", re.sub(r"layer\.\d+\..*", "relative_attention_bias", name))
    return next((path for path in paths if isinstance(_submodule(model, path), nn.Embedding)), None)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _is_conv1d(module: nn.Module | None) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _is_linear(module: nn.Module | None) -> bool:
    if isinstance(module, nn.Sequential):  # A low-rank layer.
        return len(module) > 0 and all(type(factor) is nn.Linear for factor in module)
    return type(module) is nn.Linear or _is_conv1d(module)


def _features(layer: Any, inputs: bool) -> int:
    if isinstance(layer, nn.Sequential):
        layer = layer[0 if inputs else -1]
    return int(layer.weight.shape[1 if inputs != _is_conv1d(layer) else 0])


def _select(parameter: nn.Parameter, indices: list[int], dim: int) -> nn.Parameter:
    chosen = torch.tensor(indices, device=parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, chosen), requires_grad=parameter.requires_grad)


def _blocks(units: list[int], size: int) -> list[int]:
    return [row for unit in units for row in range(unit * size, (unit + 1) * size)]
