"""Vocabulary trimming: the tokens that a corpus uses, and what is needed to spell any other word.

Half of a small transformer's parameters are its embedding, and one language or domain uses a
fraction of it (Abdaoui et al. 2020, Load What You Need, arXiv 2010.05609). Tokenizer and model
are trimmed together: a text of kept tokens gives the same outputs as before, any other text is
split into more tokens, and none becomes unknown that was not.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_nascomp.compression.subwords import kept_merges, needed_tokens, tokens_of
from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

_TEXTS_A_BATCH = 1000


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A smaller vocabulary.

    Attributes:
        tokenizer: The tokenizer with the smaller vocabulary.
        kept: Id in the original vocabulary of each token of the smaller one.
    """

    tokenizer: Any
    kept: list[int]


def trim_vocabulary(tokenizer: Any, texts: Iterable[str]) -> TrimmedVocabulary:
    """A copy of the tokenizer with the tokens that the texts need.

    Special tokens keep their ids where the smaller vocabulary reaches that far, the others their order.

    Args:
        tokenizer: A HuggingFace tokenizer on the Rust backend: WordPiece, BPE or Unigram.
        texts: The corpus.

    Raises:
        ConfigError: For another kind of tokenizer, or one that cannot spell its own tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"vocabulary: a {type(tokenizer).__name__} was given, a fast HuggingFace tokenizer is allowed"
        )
    data = json.loads(backend.to_str())
    model, added = data["model"], data["added_tokens"]
    tokens = tokens_of(model)
    numbers = {token: number for number, token in enumerate(tokens)}
    special = {token["content"] for token in added} | {model.get("unk_token")}
    if model.get("unk_id") is not None:
        special.add(tokens[model["unk_id"]])
    needed = needed_tokens(model, _used_tokens(data, texts), special & numbers.keys())
    inside = _ordered([numbers[token] for token in needed], {numbers[token] for token in special & numbers.keys()})
    kept = inside + sorted(token["id"] for token in added if token["content"] not in numbers)
    new_ids = {old: new for new, old in enumerate(kept)}
    data["model"] = _trimmed_model(model, [tokens[number] for number in inside], inside, new_ids)
    for token in added:
        token["id"] = new_ids[token["id"]]
    added.sort(key=lambda token: token["id"])
    _renumber(data, new_ids)
    return TrimmedVocabulary(_with_backend(tokenizer, data, new_ids), kept)


def trim_embedding(model: nn.Module, kept: Sequence[int]) -> None:
    """Leaves the kept tokens' rows in a HuggingFace model's embedding and output layer, in place.

    Tied weights stay tied. `config.vocab_size` and the special tokens' ids in configs follow.

    Args:
        model: A HuggingFace model.
        kept: Row of the present embedding for each token of the smaller vocabulary.

    Raises:
        ConfigError: For a model without a token embedding, or rows that it does not have.
    """
    import torch

    hf_model: Any = model
    embedding: Any = hf_model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(getattr(embedding, "weight", None), torch.nn.Parameter):
        raise ConfigError(f"vocabulary: {type(model).__name__} has no token embedding; a HuggingFace model is allowed")
    size = len(embedding.weight)
    if not kept or min(kept) < 0 or max(kept) >= size:
        raise ConfigError(f"vocabulary: rows up to {max(kept, default=-1)} were given, 0 to {size - 1} are allowed")
    output = hf_model.get_output_embeddings()
    tables = [embedding.weight, *(output.parameters(recurse=False) if output is not None else ())]
    _replace_parameters(model, {id(table): table for table in tables if len(table) == size}, list(kept))
    new_ids = {old: new for new, old in enumerate(kept)}
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and len(module.weight) != module.num_embeddings:
            module.num_embeddings = len(kept)
            if module.padding_idx is not None:
                module.padding_idx = new_ids.get(module.padding_idx)
        elif isinstance(module, torch.nn.Linear) and len(module.weight) != module.out_features:
            module.out_features = len(kept)
    _replace_logit_bias(model, size, kept)
    for config in _configs(model):
        _adapt_config(config, size, len(kept), new_ids)


def _used_tokens(data: Mapping[str, Any], texts: Iterable[str]) -> set[str]:
    from tokenizers import Tokenizer

    whole = Tokenizer.from_str(json.dumps({**data, "truncation": None, "padding": None}))
    used: set[str] = set()
    rest = iter(texts)
    while batch := list(itertools.islice(rest, _TEXTS_A_BATCH)):
        for encoding in whole.encode_batch(batch, add_special_tokens=False):
            used.update(encoding.tokens)
    return used


def _ordered(numbers: Iterable[int], special: set[int]) -> list[int]:
    """The numbers in order, save that special ones stay at their own place if there is one."""
    numbers = sorted(numbers)
    fixed = {number for number in special if number < len(numbers)}
    others = (number for number in numbers if number not in fixed)
    return [place if place in fixed else next(others) for place in range(len(numbers))]


def _trimmed_model(
    model: Mapping[str, Any], tokens: list[str], inside: list[int], new_ids: Mapping[int, int]
) -> dict[str, Any]:
    trimmed = dict(model)
    if model["type"] == "Unigram":
        trimmed["vocab"] = [model["vocab"][number] for number in inside]
        if model.get("unk_id") is not None:
            trimmed["unk_id"] = new_ids[model["unk_id"]]
    else:
        trimmed["vocab"] = {token: number for number, token in enumerate(tokens)}
    if model["type"] == "BPE":
        trimmed["merges"] = kept_merges(model, tokens)
    return trimmed


def _renumber(data: dict[str, Any], new_ids: Mapping[int, int]) -> None:
    """The ids that padding and post-processors hold, in place."""
    if data.get("padding"):
        data["padding"]["pad_id"] = new_ids.get(data["padding"]["pad_id"], data["padding"]["pad_id"])
    processors = [data["post_processor"]] if data.get("post_processor") else []
    while processors:
        processor = processors.pop()
        processors.extend(processor.get("processors", ()))
        for side in ("sep", "cls"):
            if side in processor:
                token, number = processor[side]
                processor[side] = [token, new_ids[number]]
        for entry in (processor.get("special_tokens") or {}).values():
            entry["ids"] = [new_ids[number] for number in entry["ids"]]


def _with_backend(tokenizer: Any, data: Mapping[str, Any], new_ids: Mapping[int, int]) -> Any:
    """A copy of the tokenizer around another backend."""
    from tokenizers import Tokenizer

    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(data))
    # What the constructor was given is saved beside the backend, old ids and files among it.
    settings = trimmed.init_kwargs
    for name in ("vocab_file", "merges_file", "tokenizer_file", "vocab", "merges"):
        settings.pop(name, None)
    decoder = settings.get("added_tokens_decoder") or {}
    settings["added_tokens_decoder"] = {new_ids[int(old)]: token for old, token in decoder.items()}
    for name, value in (("_vocab", data["model"]["vocab"]), ("_merges", data["model"].get("merges"))):
        if hasattr(trimmed, name):
            setattr(trimmed, name, value)
    return trimmed


def _replace_parameters(model: nn.Module, tables: Mapping[int, Tensor], kept: list[int]) -> None:
    import torch

    trimmed = {
        key: torch.nn.Parameter(table.detach()[kept].clone(), requires_grad=table.requires_grad)
        for key, table in tables.items()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in trimmed:
                module._parameters[name] = trimmed[id(parameter)]


def _replace_logit_bias(model: nn.Module, size: int, kept: Sequence[int]) -> None:
    """BART and its kin add a buffer to the logits."""
    for module in model.modules():
        bias = module._buffers.get("final_logits_bias")
        if bias is not None and bias.shape[-1] == size:
            module._buffers["final_logits_bias"] = bias[..., list(kept)].clone()


def _configs(model: nn.Module) -> list[Any]:
    """All configs of the model and its parts, each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            config = getattr(module, name, None)
            for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))):
                if hasattr(part, "to_dict"):
                    found[id(part)] = part
    return list(found.values())


def _adapt_config(config: Any, size: int, new_size: int, new_ids: Mapping[int, int]) -> None:
    if hasattr(config, "vocab_size") and config.vocab_size != size:
        return  # Of another modality.
    if hasattr(config, "vocab_size"):
        config.vocab_size = new_size
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and isinstance(value, int) and value in new_ids:
            setattr(config, name, new_ids[value])
        elif name.endswith("_token_id") and isinstance(value, list):
            setattr(config, name, [new_ids.get(number, number) for number in value])
