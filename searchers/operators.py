"""Variation of configs that knows what a dimension decides, for many configs at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_nascomp.space import Dimension, Role

_LATE = (Role.BITS, Role.DISTILLATION, Role.TRAINING)
_CONTINUOUS_STEP = 0.12
_FEW, _ROLE, _LATE_ONLY, _ANEW = range(4)


class Variation:
    """Crossover and mutation of encoded configs.

    Args:
        dimensions: The space's dimensions, one or more.
        by_role: False leaves out the moves that look at roles.
    """

    def __init__(self, dimensions: Sequence[Dimension], by_role: bool = True) -> None:
        self._by_role = by_role
        # A stepped dimension in logarithm has no even levels: it moves as a continuous one does.
        counts = [0 if d.log else d.count or 0 for d in dimensions]
        self._last = np.array(counts) - 1
        self._step = np.where(self._last > 0, 1 / np.maximum(self._last, 1), _CONTINUOUS_STEP)
        self._ordinal = np.array([d.is_ordinal for d in dimensions])
        names = [d.role.value for d in dimensions]
        self._roles = np.unique(names, return_inverse=True)[1]
        self._shiftable = np.unique(self._roles[self._ordinal])
        self._late = np.array([d.role in _LATE for d in dimensions])
        self._bits = np.array([d.role is Role.BITS for d in dimensions])

    def crossover(self, rng: np.random.Generator, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Each value from one of two parents, one of them preferred.

        Args:
            rng: Source of randomness.
            one: Encoded configs, shape `(n, dimensions)`.
            other: As many others.
        """
        from_one = rng.random(one.shape) < rng.uniform(0.2, 0.8, (len(one), 1))
        return np.where(from_one, one, other)

    def mutate(self, rng: np.random.Generator, encoded: np.ndarray) -> np.ndarray:
        """A neighbour of each config.

        One of four moves: a few dimensions take a small step; all dimensions of one role shift
        together; only dimensions of late stages (bits, distillation, training) move, so that the
        earlier stages are shared with the parent; one dimension is drawn anew.

        Args:
            rng: Source of randomness.
            encoded: Encoded configs, shape `(n, dimensions)`.
        """
        n, dimensions = encoded.shape
        chances = [0.45, 0.25, 0.15, 0.15] if self._by_role and len(self._shiftable) else [0.75, 0.0, 0.0, 0.25]
        move = rng.choice(4, size=(n, 1), p=chances)
        if not self._late.any():
            move[move == _LATE_ONLY] = _FEW
        order = rng.random((n, dimensions))
        order[(move == _LATE_ONLY) & ~self._late] = 2.0
        place = order.argsort(axis=1).argsort(axis=1)
        count = np.where(move == _ANEW, 1, rng.geometric(0.5, (n, 1)))
        chosen = (place < count) & (order < 1)
        sign = np.where(rng.random((n, dimensions)) < 0.5, 1, -1)
        steps = sign * rng.geometric(0.5, (n, dimensions))
        if self._by_role and len(self._shiftable):
            role = self._shiftable[rng.integers(len(self._shiftable), size=(n, 1))]
            together = sign[:, :1] * rng.integers(1, 4, (n, 1))
            steps = np.where(move == _ROLE, together, steps)
            members = (self._roles == role) & self._ordinal & (rng.random((n, dimensions)) < 0.9)
            chosen = np.where(move == _ROLE, members, chosen)
        anew = rng.random((n, dimensions))
        moved = np.where(self._ordinal, self._shifted(encoded, steps), self._another(encoded, anew))
        moved = np.where(move == _ANEW, anew, moved)
        return self._snapped(np.where(chosen, moved, encoded))

    def requantize(self, rng: np.random.Generator, encoded: np.ndarray) -> np.ndarray:
        """A neighbour of each config with other bits and nothing else changed.

        Args:
            rng: Source of randomness.
            encoded: Encoded configs, shape `(n, dimensions)`.
        """
        order = np.where(self._bits, rng.random(encoded.shape), 2.0)
        chosen = (order.argsort(axis=1).argsort(axis=1) < rng.geometric(0.5, (len(encoded), 1))) & self._bits
        sign = np.where(rng.random(encoded.shape) < 0.5, 1, -1)
        steps = sign * rng.geometric(0.5, encoded.shape)
        another = self._another(encoded, rng.random(encoded.shape))
        moved = np.where(self._ordinal, self._shifted(encoded, steps), another)
        return self._snapped(np.where(chosen, moved, encoded))

    def _shifted(self, encoded: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Some levels further, reflected at the ends."""
        delta = steps * self._step
        beyond = (encoded + delta < -1e-9) | (encoded + delta > 1 + 1e-9)
        return np.asarray(np.clip(encoded + np.where(beyond, -delta, delta), 0, 1))

    def _another(self, encoded: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Any other value of an unordered dimension."""
        last = np.maximum(self._last, 1)
        offset = 1 + np.floor(drawn * last)
        return np.asarray(np.mod(np.rint(encoded * last) + offset, last + 1) / last)

    def _snapped(self, encoded: np.ndarray) -> np.ndarray:
        last = np.maximum(self._last, 1)
        levels = np.where(self._last == 0, 0.0, np.rint(encoded * last) / last)
        return np.where(self._last < 0, encoded, levels)
