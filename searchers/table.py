"""Observations as arrays that grow, so that a long search does not build them anew for each trial."""

from __future__ import annotations

import numpy as np

_COMPLETED, _FINAL, _FIDELITY, _VIOLATION = range(4)


class ObservationTable:
    """Encoded configs, metrics and losses, one row an observation.

    Args:
        dimensions: Length of an encoded config.
        metrics: Number of the goal's metrics.
        objectives: Number of its objectives.
    """

    def __init__(self, dimensions: int, metrics: int, objectives: int) -> None:
        self._ends = np.cumsum([dimensions, metrics, objectives]).tolist()
        self._rows = np.empty((64, self._ends[-1] + 4))
        self._known = np.empty((0, 0))
        self._length = 0
        self._final: np.ndarray | None = None

    def __len__(self) -> int:
        return self._length

    def append(
        self,
        encoded: np.ndarray,
        metrics: np.ndarray,
        losses: np.ndarray,
        violation: float,
        fidelity: int,
        completed: bool,
        final: bool,
        known: np.ndarray,
    ) -> None:
        """Adds an observation; `final` is what its last report says of itself, `known` what the cost model does."""
        if self._length == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        rest = (float(completed), float(final), float(fidelity), violation)
        self._rows[self._length] = np.concatenate([encoded, metrics, losses, rest])
        if self._known.shape[1] < len(known) or len(self._known) < len(self._rows):
            grown = np.full((len(self._rows), max(self._known.shape[1], len(known))), np.nan)
            grown[: len(self._known), : self._known.shape[1]] = self._known
            self._known = grown
        self._known[self._length, : len(known)] = known
        self._length += 1
        self._final = None

    @property
    def known(self) -> np.ndarray:
        """What the cost model knows, in logarithm, NaN for what it cannot carry out, shape `(n, known)`."""
        return self._known[: self._length]

    @property
    def encoded(self) -> np.ndarray:
        """Encoded configs, shape `(n, dimensions)`."""
        return self._rows[: self._length, : self._ends[0]]

    @property
    def metrics(self) -> np.ndarray:
        """The goal's metrics, NaN where one is missing, shape `(n, metrics)`."""
        return self._rows[: self._length, self._ends[0] : self._ends[1]]

    @property
    def losses(self) -> np.ndarray:
        """Losses, shape `(n, objectives)`."""
        return self._rows[: self._length, self._ends[1] : self._ends[2]]

    @property
    def violations(self) -> np.ndarray:
        """Violations, shape `(n,)`."""
        return self._flag(_VIOLATION)

    @property
    def final(self) -> np.ndarray:
        """Positions of completed observations that say they are final, or are as long as the longest."""
        if self._final is None:
            completed = self._flag(_COMPLETED) > 0
            fidelity = self._flag(_FIDELITY)
            longest = fidelity[completed].max(initial=0)
            self._final = np.flatnonzero(completed & ((self._flag(_FINAL) > 0) | (fidelity >= longest)))
        return self._final

    def _flag(self, index: int) -> np.ndarray:
        return self._rows[: self._length, self._ends[2] + index]
