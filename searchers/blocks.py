"""Blocks of a space's dimensions, and the space in which all but one block are held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_nascomp.errors import ConfigError
from ray_nascomp.space import Dimension, Role, Space


class HeldSpace(Space):
    """A space whose configs all share some values.

    Its dimensions, encodings and keys are those of the whole space, so that what was tried outside
    of it can be learnt from; only the configs that it makes have the held values.

    Args:
        whole: The space.
        is_free: Which dimensions are not held, shape `(dimensions,)`.
        held: One value a dimension; those of free ones are not looked at.
    """

    def __init__(self, whole: Space, is_free: np.ndarray, held: Sequence[Any]) -> None:
        super().__init__({})
        self._set(whole.dimensions, whole._constants)
        self._whole, self._is_free, self._values_held = whole, is_free.tolist(), list(held)

    def to_config(self, values: Sequence[Any]) -> dict[str, Any]:
        """The canonical config of the free dimensions' values and the held ones."""
        chosen = zip(values, self._values_held, self._is_free, strict=True)
        return super().to_config([value if free else held for value, held, free in chosen])

    def canonical(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """As the whole space has it: a config from outside keeps its values."""
        return self._whole.canonical(config)

    def key(self, config: Mapping[str, Any]) -> str:
        """As the whole space has it."""
        return self._whole.key(config)


def find_blocks(space: Space, prefixes: Mapping[str, Sequence[str]] | None) -> dict[str, np.ndarray]:
    """Name of each block -> which dimensions it holds, shape `(dimensions,)`, in order.

    Args:
        space: The space.
        prefixes: Name of each block -> beginnings of its keys, joined by "/". None stands for
            "architecture" and "compression", which is all else; in a space without architecture
            for its sections, and "others" for keys outside of one.

    Raises:
        ConfigError: If there are fewer than two blocks, a prefix is unknown, or a dimension is in no block.
    """
    if prefixes is None:
        names = [_section(space, dimension) for dimension in space.dimensions]
        blocks = {name: np.array([other == name for other in names]) for name in dict.fromkeys(names)}
        blocks = dict(sorted(blocks.items(), key=lambda block: block[0] != "architecture"))
    else:
        blocks = {name: _matching(space, name, list(keys)) for name, keys in prefixes.items()}
    if len(blocks) < 2:
        raise ConfigError(
            f"blocks: {', '.join(blocks) or 'none'} was given or found in the space, two or more are allowed: "
            'blocks={"first": ["prefix", ...], "second": [...]}'
        )
    covered = np.any(list(blocks.values()), axis=0)
    left_out = [d.name for d, is_in in zip(space.dimensions, covered, strict=True) if not is_in]
    if left_out:
        raise ConfigError(f"blocks: {', '.join(left_out)} are in none; every dimension has to be in one")
    return blocks


def uncompressed(dimension: Dimension, rng: np.random.Generator) -> Any:
    """The value with which nothing is compressed, where there is one; else a random value."""
    if dimension.role is Role.SPARSITY and dimension.is_ordinal:
        return dimension.from_unit(0.0)
    if dimension.role in (Role.BITS, Role.RANK) and (dimension.is_ordinal or len(dimension.categories) == 2):
        return dimension.from_unit(1.0)
    return dimension.sample(rng)


def _section(space: Space, dimension: Dimension) -> str:
    if any(d.role is Role.ARCHITECTURE for d in space.dimensions):
        return "architecture" if dimension.role is Role.ARCHITECTURE else "compression"
    return dimension.path[0] if len(dimension.path) > 1 else "others"


def _matching(space: Space, block: str, prefixes: list[str]) -> np.ndarray:
    paths = [dimension.path for dimension in space.dimensions]
    result = np.zeros(len(paths), dtype=bool)
    for prefix in prefixes:
        keys = tuple(prefix.split("/"))
        found = np.array([path[: len(keys)] == keys for path in paths])
        if not found.any():
            raise ConfigError.unknown(f"prefix of block {block!r}", prefix, [d.name for d in space.dimensions])
        result |= found
    return result
