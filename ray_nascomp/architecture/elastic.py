"""A pretrained transformer as a space of smaller ones that inherit its weights.

Which blocks stay, how many heads and how many feed-forward neurons each has, after DynaBERT
(Hou et al. 2020, arXiv 2004.04037) and HAT (Wang et al. 2020, arXiv 2005.14187): heads and
neurons are ranked by importance first, so that those that stay are the best ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from torch import nn

from ray_nascomp.architecture.blocks import Block, drop_blocks, find_blocks
from ray_nascomp.architecture.importance import by_magnitude, by_taylor
from ray_nascomp.architecture.specs import HEAD_KEYS, ElasticSpecs, dropped_blocks
from ray_nascomp.compression.attention import find_attentions, remove_heads
from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.space import when
from ray_nascomp.tasks.base import Task

_WIDTH_STEP = 8


class ElasticTransformer:
    """Builds sub-networks of a model.

    Args:
        model: The whole model.
        blocks: Its blocks.
        ranking: Name of an attention or of a feed-forward's last layer -> its heads or neurons, the most
            important first.
    """

    inherits = True
    """Sub-networks come with their weights."""

    def __init__(self, model: nn.Module, blocks: tuple[Block, ...], ranking: Mapping[str, list[int]]) -> None:
        self.model = model
        self.blocks = blocks
        self.ranking = dict(ranking)

    def __call__(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The sub-network of an architecture; with everything kept it equals the model."""
        network = copy.deepcopy(self.model)
        dropped = dropped_blocks(architecture)
        attentions = {attention.name: attention for attention in find_attentions(network)}
        for block in self.blocks:
            if block.name in dropped:
                continue
            values = architecture.get(block.name, {})
            for key, attention in zip(HEAD_KEYS, block.attentions, strict=False):
                kept = values.get(key, attention.units)
                if kept < attention.units:
                    remove_heads(network, attentions[attention.name], self.ranking[attention.name][kept:])
            if (feed_forward := block.feed_forward) is not None:
                width = values.get("width", feed_forward.width)
                if width < feed_forward.width:
                    feed_forward.keep(network, sorted(self.ranking[feed_forward.contract][:width]))
        if dropped:
            drop_blocks(network, dropped)
        return network

    def with_model(self, model: nn.Module, ranking: Mapping[str, list[int]] | None = None) -> ElasticTransformer:
        """The same sub-networks with other weights.

        Args:
            model: A model of the same structure.
            ranking: Another order of heads and neurons.
        """
        return ElasticTransformer(model, self.blocks, self.ranking if ranking is None else ranking)

    def specs(self, whole: ModelSpec) -> ElasticSpecs:
        """What tells the structure of sub-networks without building them.

        Args:
            whole: The whole model's structure.
        """
        return ElasticSpecs(whole, self.blocks)


def elastic_transformer(
    model: nn.Module,
    *,
    task: Task | None = None,
    heads: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    depth: bool = True,
) -> tuple[ElasticTransformer, dict[str, Any]]:
    """A builder of sub-networks and its dimensions, for `Task(build=..., architecture=...)`.

    The first block of every stack stays. T5's heads are the same in all layers of a stack, so
    they are a dimension of its first block. With grouped queries, key-value heads go with all
    their queries.

    Args:
        model: A model of transformers, of a family that `find_attentions` knows.
        task: A task with this model; heads and neurons are then ranked by their effect on its
            loss, otherwise by their weights alone.
        heads: Shares of the heads that can stay in a block; empty to leave heads out of the search.
        widths: Shares of the neurons that can stay in a block, rounded to multiples of 8; empty to
            leave them out.
        depth: Whether blocks can be left out.

    Returns:
        The builder, and for each block its dimensions: "keep", "heads", "cross_heads" (in
        decoders that look at an encoder) and "width", as numbers of heads and neurons.

    Raises:
        ConfigError: If the model has no block that is known, or a share is not in (0, 1].
    """
    for name, shares in (("heads", heads), ("widths", widths)):
        if any(not 0 < share <= 1 for share in shares):
            raise ConfigError(f"{name}: {list(shares)} was given, shares above 0 and up to 1 are allowed")
    blocks = find_blocks(model)
    if not blocks:
        raise ConfigError(f"model: a {type(model).__name__} has no transformer blocks that are known")
    importance = by_taylor(model, blocks, task) if task is not None else by_magnitude(model, blocks)
    architecture: dict[str, Any] = {}
    stacks: set[str] = set()
    for block in blocks:
        dimensions: dict[str, Any] = {}
        for key, attention in zip(HEAD_KEYS, block.attentions, strict=False):
            counts = sorted({max(1, round(share * attention.units)) for share in heads})
            if len(counts) > 1:
                dimensions[key] = tune.choice(counts)
        if block.feed_forward is not None:
            full = block.feed_forward.width
            rounded = {full if share == 1 else _WIDTH_STEP * round(share * full / _WIDTH_STEP) for share in widths}
            counts = sorted(rounded - {0})
            if len(counts) > 1:
                dimensions["width"] = tune.choice(counts)
        if depth and block.stack in stacks:
            place = f"architecture/{block.name}/keep"
            conditional = {key: when(domain, place, [True]) for key, domain in dimensions.items()}
            dimensions = {"keep": tune.choice([True, False]), **conditional}
        stacks.add(block.stack)
        if dimensions:
            architecture[block.name] = dimensions
    if not architecture:
        raise ConfigError("heads, widths, depth: nothing is left to search")
    ranking = {name: values.argsort(descending=True, stable=True).tolist() for name, values in importance.items()}
    return ElasticTransformer(model, blocks, ranking), architecture
