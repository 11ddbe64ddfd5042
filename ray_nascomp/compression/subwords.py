"""Which tokens of a subword vocabulary cannot be spared, so that every word can still be spelled.

All functions read the `model` section of a tokenizer's JSON, as HuggingFace's tokenizers write it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ray_nascomp.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
Merge = tuple[str, str]


def tokens_of(model: Mapping[str, Any]) -> list[str]:
    """All tokens in the order of their ids.

    Raises:
        ConfigError: If the tokenizer does not split words into subwords.
    """
    if model["type"] == "Unigram":
        return [piece for piece, _ in model["vocab"]]
    if model["type"] in ("WordPiece", "BPE"):
        return sorted(model["vocab"], key=model["vocab"].__getitem__)
    raise ConfigError.unknown("vocabulary: tokenizer model", model["type"], ("WordPiece", "BPE", "Unigram"))


def needed_tokens(model: Mapping[str, Any], used: Collection[str], special: Collection[str]) -> set[str]:
    """The tokens to keep: those in use, and what spells whatever else the vocabulary can spell.

    Args:
        model: The tokenizer's model.
        used: Tokens of the corpus.
        special: Tokens that are matched as a whole, before words are split.

    Returns:
        WordPiece: single characters, at the start of a word and within it. BPE: single characters,
        which of a byte-level vocabulary are the 256 bytes, and the steps by which tokens in use are
        merged. Unigram: single characters. Of each kind the tokens of single bytes, and those in use.

    Raises:
        ConfigError: If a token holds a character that cannot be spelled without it, so that words
            might become unknown.
    """
    tokens = set(tokens_of(model))
    needed = {token for token in tokens if _is_letter(model, token) or _BYTE_TOKEN.fullmatch(token)}
    needed |= tokens & (set(used) | set(special))
    if model["type"] == "BPE":
        for merges in map(_Derivation(model), needed.copy()):
            needed.update(_merged(model, pair) for pair in merges)
        return needed
    for token in tokens - needed:
        letters = _letters(model, token)
        missing = [letter for letter in letters if letter not in tokens]
        if model["type"] == "WordPiece" and missing == letters[:1]:
            needed.add(token)  # It starts words that nothing else can start.
        elif missing:
            raise ConfigError(
                f"vocabulary: {token!r} holds {missing[0]!r}, which is no token of its own; without it words would "
                "become unknown. Tokenizers whose vocabulary spells all its tokens are allowed"
            )
    return needed


def kept_merges(model: Mapping[str, Any], kept: Iterable[str]) -> list[list[str]]:
    """The merges of a BPE model that make the tokens, in the model's order."""
    wanted = {pair for merges in map(_Derivation(model), kept) for pair in merges}
    return [list(pair) for pair in _merges(model) if pair in wanted]


class _Derivation:
    """The merges that lead from letters to a token, in the order in which BPE makes them."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self._ranks = {pair: rank for rank, pair in enumerate(_merges(model))}

    def __call__(self, token: str) -> list[Merge]:
        symbols = _letters(self._model, token)
        steps: list[Merge] = []
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            rank, place = min((self._ranks.get(pair, len(self._ranks)), place) for place, pair in enumerate(pairs))
            if rank == len(self._ranks):
                break
            steps.append(pairs[place])
            symbols[place : place + 2] = [_merged(self._model, pairs[place])]
        return steps


def _merges(model: Mapping[str, Any]) -> list[Merge]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _merged(model: Mapping[str, Any], pair: Merge) -> str:
    return pair[0] + pair[1].removeprefix(model.get("continuing_subword_prefix") or "")


def _letters(model: Mapping[str, Any], token: str) -> list[str]:
    """The single characters that a token is made of, as tokens."""
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    within = bool(prefix) and token.startswith(prefix) and len(token) > len(prefix)
    body = token[len(prefix) :] if within else token
    ends = bool(suffix) and body.endswith(suffix) and len(body) > len(suffix)
    body = body[: -len(suffix)] if ends else body
    letters = [(prefix if within or place else "") + letter for place, letter in enumerate(body)]
    if ends:
        letters[-1] += suffix
    return letters


def _is_letter(model: Mapping[str, Any], token: str) -> bool:
    return len(_letters(model, token)) == 1
