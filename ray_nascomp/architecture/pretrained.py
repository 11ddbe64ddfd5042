"""Compressed networks saved as transformers saves models, so that they load without this package."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from ray_nascomp.architecture.blocks import KeptLayers, find_blocks
from ray_nascomp.architecture.shaping import Resize, shape_layers
from ray_nascomp.compression.attention import HEAD_ATTRIBUTES
from ray_nascomp.errors import ConfigError

CODE_FILE = "modeling_compressed.py"
_ARGUMENTS = {
    "Linear": ("in_features", "out_features"),
    "Embedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    "Conv1d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "Identity": (),
}
_WIDTH_FIELDS = ("intermediate_size", "hidden_dim", "n_inner", "d_ff")
_CODE = '''

from transformers import {base}


class Compressed{base}({base}):
    """A {base} whose layers have the shapes that its config tells."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        shape_layers(self, config.compressed)
'''


def save_network(network: nn.Module, folder: Path, auto_class: str, use_cache: bool) -> bool:
    """Writes weights and config, and the code that gives layers their shapes where the config cannot tell them.

    Args:
        network: A network made from a model of transformers.
        folder: Where the files go.
        auto_class: transformers' class that is to load it: "AutoModelForSequenceClassification".
        use_cache: What the config is to say of caching keys and values.

    Returns:
        Whether the config tells all shapes, so that no code was written.

    Raises:
        ConfigError: If a layer is of a class that is neither the model's nor torch's.
    """
    model: Any = _numbered(copy.deepcopy(network).cpu().eval())
    if hasattr(model.config, "compressed"):  # It was loaded from a folder that this function wrote.
        model.__class__ = type(model).__mro__[1]
        del model.config.compressed, model.config.auto_map
    base = type(model).__name__
    config = model.config
    if hasattr(config, "use_cache"):
        config.use_cache = use_cache
    whole = _empty(model, config)
    _restore_conv1d(model, whole)
    _restore_weight_norm(model, whole)
    uniform = _with_shapes_of(model, copy.deepcopy(config))
    try:
        is_plain = not any(_differences(model, _empty(model, uniform)).values())
    except ValueError:
        is_plain = False  # The family's config has no such shape: BERT's heads share out the hidden size.
    if is_plain:
        model.config = uniform
    else:
        config.compressed = _differences(model, whole)
        config.auto_map = {auto_class: f"{CODE_FILE.removesuffix('.py')}.Compressed{base}"}
    # Classes of one's own are not among those for which transformers renames weights when it loads them.
    model.save_pretrained(folder, save_original_format=is_plain)
    code = folder / CODE_FILE
    if is_plain:
        code.unlink(missing_ok=True)
    else:
        code.write_text(Path(shape_layers.__code__.co_filename).read_text() + _CODE.format(base=base))
    return is_plain


def _numbered(network: Any) -> Any:
    """The network with the layers of every list numbered without gaps."""
    for name, module in list(network.named_modules()):
        if isinstance(module, KeptLayers):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, nn.ModuleList(module._modules.values()))
    return network


def _with_shapes_of(network: nn.Module, config: Any) -> Any:
    """The config with heads and widths of the network's blocks, where these are alike."""
    blocks = find_blocks(network)
    for side in ("encoder", "decoder", ""):
        own = [block for block in blocks if f"{side}." in f"{block.stack}."]
        prefix = f"{side}_" if side and hasattr(config, f"{side}_attention_heads") else ""
        attentions = [attention for block in own for attention in block.attentions]
        heads = {(found.heads, found.kv_heads, found.head_dim) for found in attentions}
        widths = {block.feed_forward.width for block in own if block.feed_forward is not None}
        if len(heads) == 1:
            count, kv_count, head_dim = heads.pop()
            field = f"{prefix}attention_heads" if prefix else "num_attention_heads"
            known = getattr(config, field, count)
            if isinstance(known, int) and known != count:  # Of several stages there are several numbers.
                setattr(config, field, count)
                config.head_dim = head_dim
            if hasattr(config, "num_key_value_heads"):
                config.num_key_value_heads = kv_count
        if len(widths) == 1:
            width = widths.pop()
            for field in (f"{prefix}ffn_dim",) if prefix else _WIDTH_FIELDS:
                if hasattr(config, field) and not isinstance(getattr(config, field), (list, tuple)):
                    setattr(config, field, width)
    return config


def _empty(network: nn.Module, config: Any) -> nn.Module:
    """A model of the network's class as a config makes it, without weights."""
    with torch.device("meta"):
        model: nn.Module = type(network)(copy.deepcopy(config))
    return model


def _restore_conv1d(network: Any, whole: nn.Module) -> None:
    """Puts a `Conv1D` wherever the network's family has one and a linear layer has taken its place."""
    for name, layer in whole.named_modules():
        mine = _get(network, name)
        if type(layer).__name__ == "Conv1D" and type(mine) is nn.Linear:
            conv1d: Any = type(layer)(mine.out_features, mine.in_features)
            conv1d.weight = nn.Parameter(mine.weight.detach().t().contiguous())
            conv1d.bias = nn.Parameter(torch.zeros(mine.out_features) if mine.bias is None else mine.bias.detach())
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, conv1d)


def _restore_weight_norm(network: Any, whole: nn.Module) -> None:
    """Parametrizes a convolution's weight by norm and direction where the network's family does: Wav2Vec2."""
    for name, layer in whole.named_modules():
        mine = _get(network, name)
        if is_parametrized(layer, "weight") and type(mine) is nn.Conv1d:
            norm: Any = layer.parametrizations.weight[0]
            weight_norm(mine, "weight", norm.dim)


def _differences(network: nn.Module, whole: nn.Module) -> dict[str, Any]:
    """The table of `shape_layers` that makes the network's shapes of those of a whole model."""
    layers: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for name, module in whole.named_modules():
        if any(name.startswith(f"{replaced}.") for replaced in layers):
            continue
        mine = _get(network, name)
        if not _are_alike(mine, module):
            if mine is None:
                raise ConfigError(f"{name}: the network lacks this layer, so it cannot be saved as its model's class")
            layers[name] = _described(name, mine)
            continue
        theirs = dict(_numbers(module))
        changed = {key: value for key, value in _numbers(mine) if theirs.get(key) != value}
        if changed:
            attributes[name] = changed
    known = {name: tuple(value.shape) for name, value in whole.state_dict().items()}
    parameters = {
        name: list(value.shape)
        for name, value in network.state_dict().items()
        if known.get(name) != tuple(value.shape) and not any(name.startswith(f"{layer}.") for layer in layers)
    }
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: the network's model has no such parameter, so it cannot be saved as its class"
        )
    sizes = [hook.size for hook in network._forward_pre_hooks.values() if isinstance(hook, Resize)]
    changes: dict[str, Any] = {"layers": layers, "attributes": attributes, "parameters": parameters}
    return {**changes, "image_sizes": sizes} if sizes else changes


def _are_alike(first: Any, second: nn.Module) -> bool:
    """Whether two modules are of one class; parametrized ones get a new class when they are copied."""
    if hasattr(second, "parametrizations"):
        return hasattr(first, "parametrizations")
    return type(first) is type(second)


def _described(name: str, layer: Any) -> dict[str, Any]:
    if isinstance(layer, nn.Sequential):
        return {"layers": [_described(f"{name}.{key}", child) for key, child in layer.named_children()]}
    kind = type(layer).__name__
    if getattr(nn, kind, None) is not type(layer) or kind not in _ARGUMENTS:
        raise ConfigError(f"{name}: a {kind} cannot be saved in a folder of transformers; export the model instead")
    arguments = {key: getattr(layer, key) for key in _ARGUMENTS[kind]}
    if hasattr(layer, "bias"):
        arguments["bias"] = layer.bias is not None
    return {"class": kind, "arguments": arguments}


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A layer's own whole numbers and tuples of them, and of a module with layers the numbers that tell its heads."""
    has_layers = next(module.children(), None) is not None
    for key, value in vars(module).items():
        if key.startswith("_") or isinstance(value, bool) or (has_layers and key not in HEAD_ATTRIBUTES):
            continue
        if isinstance(value, int):
            yield key, value
        elif isinstance(value, tuple) and value and all(type(item) is int for item in value):
            yield key, list(value)


def _get(network: nn.Module, name: str) -> Any:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def write_card(folder: Path, fields: Mapping[str, Any], metrics: Mapping[str, float], is_plain: bool) -> None:
    """Writes the model card, README.md.

    Args:
        folder: Where it goes.
        fields: "auto_class", "pipeline_tag", "base_model" (or "") and "metric".
        metrics: Measured figures.
        is_plain: Whether the model loads without code of its own.
    """
    base = f"base_model: {fields['base_model']}\n" if fields["base_model"] else ""
    trust = "" if is_plain else ", trust_remote_code=True"
    note = "" if is_plain else f"\nIts layers have shapes of their own, which `{CODE_FILE}` in this folder makes.\n"
    rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in metrics.items())
    table = f"\n## Measured\n\n| metric | value |\n| --- | --- |\n{rows}" if rows else ""
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\npipeline_tag: {fields['pipeline_tag']}\n{base}tags:\n- compressed\n---\n\n"
        f"# A compressed model\n\nMade by ray-nascomp, which searches architecture and compression together.\n{note}\n"
        f"```python\nfrom transformers import {fields['auto_class']}\n\n"
        f'model = {fields["auto_class"]}.from_pretrained("path/to/this/folder"{trust})\n```\n{table}'
    )
