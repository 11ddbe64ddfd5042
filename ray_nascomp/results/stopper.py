"""Ends a search when its front has stopped growing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ray import tune

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal
from ray_nascomp.pareto import normalised_hypervolume


class HypervolumeStopper(tune.Stopper):
    """A Tune stopper: `tune.RunConfig(stop=HypervolumeStopper(goal))`.

    After each finished trial the hypervolume of all feasible results is compared with that of
    the results of `patience` finished trials before, both in the box that spans all of them, so
    that no reference has to be given. A trial counts as finished with a report that says
    `final: True`; where reports have no such key, with its first one, and its newest is used.
    No trial is stopped on its own. After `Tuner.restore` the count starts anew.

    Args:
        goal: Objectives and constraints.
        patience: Finished trials without growth after which the search ends, 1 or more. The
            search also runs on until a feasible result is there.
        min_growth: Relative growth of the hypervolume within these trials that counts as such,
            0 or more.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(self, goal: Goal, patience: int = 20, min_growth: float = 0.01) -> None:
        if not isinstance(goal, Goal):
            raise ConfigError(f"goal: {goal!r} was given, a ray_nascomp.Goal is allowed")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"patience: {patience!r} was given, a whole number from 1 is allowed")
        if not min_growth >= 0:
            raise ConfigError(f"min_growth: {min_growth!r} was given, 0 or more is allowed")
        self._goal = goal
        self._patience = patience
        self._min_growth = min_growth
        # By trial in the order of their ends: losses of shape (m,), None for an infeasible result.
        self._results: dict[str, np.ndarray | None] = {}
        # Tune asks many times a second: the answer is kept until something is reported.
        self._answer: bool | None = None

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Takes note of a report; never stops its trial."""
        if result.get("final", True) is not False:
            self._results[trial_id] = self._goal.losses(result) if self._goal.is_feasible(result) else None
            self._answer = None
        return False

    def stop_all(self) -> bool:
        """Whether the hypervolume has stopped growing."""
        if self._answer is None:
            self._answer = self._has_stopped_growing()
        return self._answer

    def _has_stopped_growing(self) -> bool:
        results = list(self._results.values())
        earlier = [losses for losses in results[: -self._patience] if losses is not None]
        if not earlier:
            return False
        every = np.stack([losses for losses in results if losses is not None])
        ideal = every.min(axis=0)
        # A tenth beyond the worst, so that a front's ends have a volume too.
        nadir = every.max(axis=0) + 0.1 * np.ptp(every, axis=0)
        before = normalised_hypervolume(np.stack(earlier), ideal, nadir)
        now = normalised_hypervolume(every, ideal, nadir)
        return now - before <= self._min_growth * before
