"""A whole search space: nested configs to vectors and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from ray.tune.search.sample import Domain

from ray_nascomp.errors import ConfigError
from ray_nascomp.space.dimensions import Dimension

_MOST_LEVELS = 4096
_TEXT = json.JSONEncoder(default=str)


class Space:
    """The dimensions and the constants of a Tune `param_space`.

    Args:
        param_space: A nested dict of Tune domains and plain values.

    Raises:
        ConfigError: If it holds a grid search, a function or a condition on an unknown key.
    """

    def __init__(self, param_space: Mapping[str, Any]) -> None:
        dimensions, constants = [], []
        for path, value in _walk(param_space):
            if isinstance(value, Domain):
                dimensions.append(Dimension.from_domain(path, value))
            else:
                constants.append((path, value))
        self._set(dimensions, constants)
        known = {path for path, _ in constants} | {dimension.path for dimension in dimensions}
        for dimension in dimensions:
            if dimension.condition is not None and dimension.condition[0] not in known:
                raise ConfigError.unknown(
                    f"condition of {dimension.name}", "/".join(dimension.condition[0]), sorted(map("/".join, known))
                )

    def _set(self, dimensions: Iterable[Dimension], constants: Iterable[tuple[tuple[str, ...], Any]]) -> None:
        self.dimensions = tuple(dimensions)
        self._constants = tuple(constants)
        self._by_path = {dimension.path: dimension for dimension in self.dimensions}
        # Values of stepped and categorical dimensions recur in every config: their places are looked up.
        self._places: tuple[dict[Any, float] | None, ...] = tuple({} if _recurs(d) else None for d in self.dimensions)
        self._is_conditional = any(dimension.condition is not None for dimension in self.dimensions)
        self._levels = tuple(d.levels if _has_few_levels(d) else None for d in self.dimensions)
        self._last = np.array([len(levels or ()) - 1 for levels in self._levels])
        # Neighbours in a nested dict are read together.
        grouped = itertools.groupby(self.dimensions, key=lambda dimension: dimension.path[:-1])
        self._branches = tuple((path, tuple(d.path[-1] for d in members)) for path, members in grouped)
        self._plain = all(d.is_ordinal or len(d.categories) < 3 for d in self.dimensions)
        self._tree: dict[str, Any] = {}
        for index, path in enumerate([*self._by_path, *(path for path, _ in self._constants)]):
            _put(self._tree, path, index)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; constants that JSON cannot hold are left out."""
        constants = [[path, value] for path, value in self._constants if _is_json(value)]
        return {"dimensions": [asdict(dimension) for dimension in self.dimensions], "constants": constants}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Space:
        """The space of `to_dict`."""
        space = cls({})
        dimensions = []
        for entry in data["dimensions"]:
            condition = entry["condition"]
            if condition is not None:
                condition = (tuple(condition[0]), tuple(condition[1]))
            changes = {"path": tuple(entry["path"]), "categories": tuple(entry["categories"]), "condition": condition}
            dimensions.append(Dimension(**{**entry, **changes}))
        space._set(dimensions, [(tuple(path), value) for path, value in data["constants"]])
        return space

    def __len__(self) -> int:
        return len(self.dimensions)

    def sample(self, rng: np.random.Generator) -> dict[str, Any]:
        """A random config, canonical."""
        return self.to_config([dimension.sample(rng) for dimension in self.dimensions])

    def to_config(self, values: Sequence[Any]) -> dict[str, Any]:
        """The canonical nested config of one value a dimension, constants included."""
        if len(values) != len(self.dimensions):
            raise ValueError(f"{len(values)} values were given for {len(self.dimensions)} dimensions")
        config = _grown(self._tree, [*values, *(constant for _, constant in self._constants)])
        if self._is_conditional:
            for dimension, active in zip(self.dimensions, self.active(config), strict=True):
                if not active:
                    _put(config, dimension.path, dimension.canonical)
        return config

    def values(self, config: Mapping[str, Any]) -> list[Any]:
        """One value a dimension, in the order of `dimensions`.

        Raises:
            ConfigError: If a key is missing.
        """
        values: list[Any] = []
        for path, keys in self._branches:
            branch = _get(config, path)
            try:
                values.extend([branch[key] for key in keys])
            except (KeyError, TypeError):
                values.extend([_get(config, (*path, key)) for key in keys])
        return values

    def canonical(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with every key, constants as they are and inactive dimensions at their canonical value.

        Raises:
            ConfigError: If a key is missing or a value is not one that its dimension can take.
        """
        values = self.values(config)
        for dimension, value in zip(self.dimensions, values, strict=True):
            if not dimension.contains(value):
                raise ConfigError(f"{dimension.name}: {value!r} was given, allowed: {dimension.allowed}")
        return self.to_config(values)

    def active(self, config: Mapping[str, Any]) -> np.ndarray:
        """Which dimensions matter in this config, boolean, shape `(dimensions,)`."""
        return np.array([self._is_active(dimension, config) for dimension in self.dimensions], dtype=bool)

    def encode(self, configs: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The configs in the unit cube, shape `(configs, dimensions)`; a categorical by its index."""
        rows = [self._row(self.values(config)) for config in configs]
        return np.array(rows, dtype=float).reshape(len(configs), len(self))

    def features(self, encoded: np.ndarray) -> np.ndarray:
        """Encoded configs `(n, dimensions)` for models: unordered categoricals of three values or more one-hot."""
        if self._plain:
            return encoded
        columns = []
        for column, dimension in zip(encoded.T, self.dimensions, strict=True):
            count = len(dimension.categories)
            if dimension.is_ordinal or count < 3:
                columns.append(column[:, None])
            else:
                columns.append(np.eye(count)[np.rint(column * (count - 1)).astype(int)])
        return np.concatenate([*columns, np.empty((len(encoded), 0))], axis=1)

    def decode(self, row: Sequence[float]) -> dict[str, Any]:
        """The canonical config nearest to a point of the unit cube, shape `(dimensions,)`."""
        return self.decode_many(np.asarray(row, dtype=float)[None])[0]

    def decode_many(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The canonical configs nearest to points of the unit cube, shape `(configs, dimensions)`."""
        columns = []
        places = np.rint(np.minimum(np.maximum(rows, 0), 1) * self._last).astype(int).T.tolist()
        for index, (dimension, levels) in enumerate(zip(self.dimensions, self._levels, strict=True)):
            if levels is None:
                columns.append([dimension.from_unit(unit) for unit in rows[:, index].tolist()])
            else:
                columns.append([levels[place] for place in places[index]])
        return (
            [self.to_config(values) for values in zip(*columns, strict=True)]
            if columns
            else [self.to_config(()) for _ in rows]
        )

    def key(self, config: Mapping[str, Any]) -> str:
        """A text that two configs share exactly where they mean the same."""
        values = self.values(config)
        return _TEXT.encode(self.values(self.to_config(values)) if self._is_conditional else values)

    def _row(self, values: Sequence[Any]) -> list[float]:
        try:
            return [places[value] for places, value in zip(self._places, values, strict=True)]  # type: ignore[index]
        except (KeyError, TypeError):  # A value that is new, or of a dimension whose values do not recur.
            return [self._place(index, value) for index, value in enumerate(values)]

    def _place(self, index: int, value: Any) -> float:
        places = self._places[index]
        if places is None:
            return self.dimensions[index].to_unit(value)
        if value not in places:
            places[value] = self.dimensions[index].to_unit(value)
        return places[value]

    def _is_active(self, dimension: Dimension, config: Mapping[str, Any]) -> bool:
        if dimension.condition is None:
            return True
        path, values = dimension.condition
        if _get(config, path) not in values:
            return False
        parent = self._by_path.get(path)
        return parent is None or self._is_active(parent, config)


def _walk(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in node.items():
        if not isinstance(key, str):
            raise ConfigError(f"{'/'.join((*path, str(key)))}: the key {key!r} was given, only text is allowed")
        here = (*path, key)
        if isinstance(value, Mapping) and set(value) == {"grid_search"}:
            raise ConfigError(f"{'/'.join(here)}: a grid_search cannot be searched; use tune.choice")
        if isinstance(value, Mapping) and value:
            yield from _walk(value, here)
        else:
            if isinstance(value, (list, tuple)) and any(isinstance(v, (Domain, Mapping)) for v in value):
                raise ConfigError(f"{'/'.join(here)}: a list that holds domains cannot be searched; use a dict")
            yield here, value


def _recurs(dimension: Dimension) -> bool:
    if dimension.kind != "categorical":
        return dimension.step is not None
    return all(isinstance(category, (str, int, float)) for category in dimension.categories)


def _has_few_levels(dimension: Dimension) -> bool:
    return dimension.count is not None and dimension.count <= _MOST_LEVELS and not dimension.log


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _get(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    node: Any = config
    try:
        for key in path:
            node = node[key]
    except (KeyError, TypeError):
        raise ConfigError(f"{'/'.join(path)}: missing from the config") from None
    return node


def _grown(tree: dict[str, Any], values: Sequence[Any]) -> dict[str, Any]:
    """The tree with values in place of their indices."""
    return {key: _grown(node, values) if isinstance(node, dict) else values[node] for key, node in tree.items()}


def _put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value
