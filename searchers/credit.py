"""Who is given the next trial: probability matching by the hypervolume that trials have added (Thierens 2005)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ray_nascomp.pareto import hypervolume
from ray_nascomp.searchers.base import GoalSearcher

_DECAY = 0.9
# The gain of a good early trial: nobody is written off or trusted before having shown something.
_FIRST = 0.05
_FLOOR = 0.2


class Credit:
    """Credit of each of several names.

    Args:
        values: Credit so far; names that are not among them start alike.
    """

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self.values = dict(values or {})

    def draw(self, rng: np.random.Generator, names: Sequence[str]) -> str:
        """A name, with a chance that follows its credit; a fifth of all draws is given to all alike."""
        credit = np.array([self.values.get(name, _FIRST) for name in names])
        chances = _FLOOR / len(names) + (1 - _FLOOR) * credit / credit.sum()
        return names[int(rng.choice(len(names), p=chances))]

    def add(self, name: str, gain: float) -> None:
        """Counts a trial's gain, in [0, 1]; older ones fade."""
        self.values[name] = max(1e-6, _DECAY * self.values.get(name, _FIRST) + (1 - _DECAY) * gain)


def hypervolume_gain(searcher: GoalSearcher) -> float:
    """Share of the hypervolume of all final results that the newest observation has added, in [0, 1].

    The first feasible result adds all there is, which is no merit of whoever has suggested it: 0.
    """
    positions = searcher.final_positions()
    if not positions or positions[-1] != len(searcher.observations) - 1:
        return 0.0
    _, losses, violations = searcher.table(positions)
    usable = (violations == 0) & np.isfinite(losses).all(axis=1)
    if not usable[-1] or usable.sum() == 1:
        return 0.0
    low, high = losses[usable].min(axis=0), losses[usable].max(axis=0)
    unit = (losses - low) / np.where(high > low, high - low, 1.0)
    reference = np.full(unit.shape[1], 1.1)
    whole = hypervolume(unit[usable], reference)
    return (whole - hypervolume(unit[:-1][usable[:-1]], reference)) / whole
