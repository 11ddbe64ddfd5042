"""Token embeddings in which rare tokens share the rows of frequent ones.

Weight sharing (Han et al. 2015, arXiv 1510.00149) of whole rows: a token without a row of its own is read as the
most similar one that has. The tokenizer stays as it is, and with it the length of every text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ray_nascomp.errors import ConfigError

_TOKENS_A_BATCH = 4096


class MergedEmbedding(nn.Module):
    """An embedding of more tokens than its table has rows.

    Args:
        table: The rows.
        rows: Row of each token, shape `(tokens,)`.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.table = table
        self.rows: Tensor
        self.register_buffer("rows", rows.to(torch.int16 if len(table.weight) <= 2**15 else torch.int32))

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors of shape `(*tokens.shape, width)`."""
        vectors: Tensor = self.table(self.rows[tokens].long())
        return vectors


def merge_embedding(model: nn.Module, kept: Sequence[int] | Tensor) -> None:
    """Leaves the kept tokens' rows in a HuggingFace model's embedding, in place; each other token gets one of these.

    It gets the one of least angle to its own. Keep special tokens, and those that a corpus uses.

    Args:
        model: A HuggingFace model.
        kept: The numbers of the tokens whose rows stay.

    Raises:
        ConfigError: For a model without a plain token embedding, one that writes tokens, or tokens that it does
            not have.
    """
    hf_model: Any = model
    embedding: Any = hf_model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if type(embedding) is not nn.Embedding:
        raise ConfigError(
            f"vocabulary: {type(model).__name__} has no plain token embedding; a HuggingFace model is allowed"
        )
    output = hf_model.get_output_embeddings()
    if output is not None and len(output.weight) == len(embedding.weight):
        raise ConfigError(
            f"vocabulary: {type(model).__name__} writes tokens, and needs all of their rows; see trim_embedding"
        )
    size = len(embedding.weight)
    given = torch.as_tensor(kept if isinstance(kept, Tensor) else list(kept))
    if len(given) and (given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool):
        raise ConfigError(
            f"vocabulary: tokens of shape {tuple(given.shape)} and {given.dtype} were given, their numbers are needed"
        )
    tokens = given.long().unique()
    if not len(tokens) or tokens[0] < 0 or tokens[-1] >= size:
        raise ConfigError(f"vocabulary: tokens {_range_of(tokens)} were given, 0 to {size - 1} are allowed")
    weight = embedding.weight.detach()
    directions = normalize(weight, dim=1)
    known = directions[tokens].T
    rows = torch.cat([(part @ known).argmax(1) for part in directions.split(_TOKENS_A_BATCH)])
    rows[tokens] = torch.arange(len(tokens))  # Of equal rows each keeps its own.
    padding = None if embedding.padding_idx is None else int(rows[embedding.padding_idx])
    table = nn.Embedding(len(tokens), weight.shape[1], padding_idx=padding, _weight=weight[tokens].clone())
    table.weight.requires_grad_(embedding.weight.requires_grad)
    hf_model.set_input_embeddings(MergedEmbedding(table, rows))


def _range_of(tokens: Tensor) -> str:
    return f"{int(tokens[0])} to {int(tokens[-1])}" if len(tokens) else "none"
