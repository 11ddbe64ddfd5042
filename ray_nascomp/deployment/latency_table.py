"""Latency on a target that is not at hand, added up from a table of measured layers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_nascomp.errors import ConfigError

_COLUMNS = ("layer", "bits", "inputs", "outputs", "ms")


@dataclass(frozen=True)
class LayerUse:
    """A layer as a candidate has it.

    Attributes:
        layer: Its name, as in the table.
        bits: Bits of its weight, 1..32.
        inputs: Input channels.
        outputs: Output channels.
    """

    layer: str
    bits: int
    inputs: int
    outputs: int


class LatencyTable:
    """Milliseconds of each layer at some widths and bits; between widths it interpolates.

    For each layer and number of bits the entries form a grid over input and output channels, at
    the least one point, that of the layer's full width. Between the grid's points the estimate is
    bilinear; below the least width it falls towards zero at zero channels, and above the largest
    it goes on as it grew before. Layers that no entry names, such as activations, cost nothing.

    Args:
        entries: Rows with `layer`, `bits`, `inputs`, `outputs` and `ms`.

    Raises:
        ConfigError: If a row lacks a column or holds no number, or a layer's rows form no grid.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        points: dict[tuple[str, int], dict[tuple[int, int], float]] = {}
        for number, row in enumerate(entries, start=1):
            layer, bits, inputs, outputs, milliseconds = _read(row, number)
            points.setdefault((layer, bits), {})[inputs, outputs] = milliseconds
        self._grids = {key: _Grid(key, found) for key, found in points.items()}
        self._layers = {layer for layer, _bits in self._grids}

    @classmethod
    def from_file(cls, path: str | Path) -> LatencyTable:
        """The table in a CSV file with a header line, or in a JSON file that holds a list of objects.

        Raises:
            ConfigError: If the file cannot be read, or its entries are not valid.
        """
        import pandas as pd

        path = Path(path)
        try:
            rows: Any = json.loads(path.read_text()) if path.suffix == ".json" else pd.read_csv(path).to_dict("records")
        except (OSError, ValueError) as error:
            raise ConfigError(f"latency table: {path} cannot be read: {error}") from error
        if not isinstance(rows, list):
            raise ConfigError(f"latency table: {path} holds a {type(rows).__name__}, a list of entries is allowed")
        return cls(rows)

    def estimate(self, uses: Iterable[LayerUse]) -> float:
        """Milliseconds of all layers together.

        Raises:
            ConfigError: If the table holds a layer, but not with these bits.
        """
        return sum(self._of(use) for use in uses)

    def _of(self, use: LayerUse) -> float:
        if use.layer not in self._layers:
            return 0.0
        grid = self._grids.get((use.layer, use.bits))
        if grid is None:
            known = sorted(bits for layer, bits in self._grids if layer == use.layer)
            raise ConfigError(f"latency table: layer {use.layer!r} with {use.bits} bits was asked for; it has {known}")
        return grid.at(use.inputs, use.outputs)


class _Grid:
    def __init__(self, key: tuple[str, int], points: Mapping[tuple[int, int], float]) -> None:
        inputs = sorted({at[0] for at in points})
        outputs = sorted({at[1] for at in points})
        if len(points) != len(inputs) * len(outputs):
            raise ConfigError(
                f"latency table: layer {key[0]!r} with {key[1]} bits has {len(points)} entries; for every pair of "
                f"inputs {inputs} and outputs {outputs} one is needed"
            )
        # Without channels a layer takes no time.
        self._inputs = np.array([0, *inputs], float)
        self._outputs = np.array([0, *outputs], float)
        self._values = np.zeros((len(inputs) + 1, len(outputs) + 1))
        self._values[1:, 1:] = [[points[i, o] for o in outputs] for i in inputs]

    def at(self, inputs: int, outputs: int) -> float:
        """Milliseconds at a width."""
        rows, across = _weights(self._inputs, inputs), _weights(self._outputs, outputs)
        return max(0.0, sum(a * b * self._values[i, j] for i, a in rows for j, b in across))


def _weights(grid: np.ndarray, at: int) -> list[tuple[int, float]]:
    """The two neighbours on a grid with their shares; beyond its end, those of the last two."""
    right = min(max(int(np.searchsorted(grid, at)), 1), len(grid) - 1)
    share = float((at - grid[right - 1]) / (grid[right] - grid[right - 1]))
    return [(right - 1, 1 - share), (right, share)]


def _read(row: Mapping[str, Any], number: int) -> tuple[str, int, int, int, float]:
    missing = [name for name in _COLUMNS if name not in row]
    if missing:
        raise ConfigError(f"latency table: entry {number} lacks {missing}; it holds {sorted(row)}")
    try:
        bits, inputs, outputs = (int(row[name]) for name in _COLUMNS[1:4])
        milliseconds = float(row["ms"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"latency table: entry {number}: {error}") from error
    if bits < 1 or inputs < 1 or outputs < 1 or not 0 <= milliseconds < float("inf"):
        raise ConfigError(f"latency table: entry {number}: {dict(row)!r} was given; positive numbers are allowed")
    return str(row["layer"]), bits, inputs, outputs, milliseconds
