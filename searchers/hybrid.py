"""A portfolio of searchers that share what they have seen.

Each trial goes to one member, drawn by credit: the hypervolume that a member's trials have added
lately, as adaptive operator selection by probability matching does (Thierens 2005).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal
from ray_nascomp.observations import Observation
from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.bayesian import BayesianSearch
from ray_nascomp.searchers.credit import Credit, hypervolume_gain
from ray_nascomp.searchers.evolutionary import EvolutionarySearch
from ray_nascomp.searchers.known_costs import CostFunction


class MakeMember(Protocol):
    """A searcher's class, or a function that makes one."""

    def __call__(self, goal: Goal, cost_model: CostFunction | None, *, seed: int) -> GoalSearcher:
        """The searcher."""


class HybridSearch(GoalSearcher):
    """A portfolio with shared history.

    Args:
        goal: See `GoalSearcher`.
        cost_model: See `GoalSearcher`.
        members: At least two searchers' classes, or functions `(goal, cost_model, *, seed)` that
            make one; None stands for evolutionary and Bayesian.
        seed: See `GoalSearcher`.
        points_to_evaluate: See `GoalSearcher`.
        warm_start: See `GoalSearcher`.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(
        self,
        goal: Goal,
        cost_model: CostFunction | None = None,
        *,
        members: Sequence[MakeMember] | None = None,
        seed: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        warm_start: Iterable[Observation] | str | Path | Any = None,
    ) -> None:
        super().__init__(goal, cost_model, seed=seed, points_to_evaluate=points_to_evaluate, warm_start=warm_start)
        makers: Sequence[MakeMember] = members if members is not None else (EvolutionarySearch, BayesianSearch)
        if len(makers) < 2:
            raise ConfigError(f"members: {len(makers)} was given, two or more are allowed")
        seeds = self.rng.integers(2**31, size=len(makers))
        self._members = [make(goal, cost_model, seed=int(s)) for make, s in zip(makers, seeds, strict=True)]
        self._credit = Credit()
        self._author: dict[str, str] = {}

    def propose(self) -> dict[str, Any]:
        """A config of the member whose turn it is."""
        name = self._credit.draw(self.rng, [str(number) for number in range(len(self._members))])
        member = self._members[int(name)]
        self._share(member)
        config = member.propose()
        if self.is_new(config):
            self._author[self.key(config)] = name
        return config

    def observed(self, observation: Observation, reports: Mapping[int, Mapping[str, Any]]) -> None:
        """All members hear of it, and its author gets credit for the hypervolume that it adds."""
        author = self._author.pop(self.key(observation.config), None)
        if author is not None:
            self._credit.add(author, hypervolume_gain(self))
        for member in self._members:
            self._share(member)
            member.observations.append(observation)
            member.observed(observation, reports)

    def own_state(self) -> dict[str, Any]:
        """Credit, who has suggested what, and the members' own states."""
        members = [{"rng": m.rng.bit_generator.state, "own": m.own_state()} for m in self._members]
        return {"credit": self._credit.values, "author": self._author, "members": members}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self._credit = Credit(state["credit"])
        self._author = state["author"]
        for member, saved in zip(self._members, state["members"], strict=True):
            member.rng.bit_generator.state = saved["rng"]
            member.observations = list(self.observations)
            member.load_own_state(saved["own"])

    def _share(self, member: GoalSearcher) -> None:
        """The table, keys, known costs and pending trials are the same objects for all."""
        member._space = self._space
        member._table, member._keys = self._table, self._keys
        member._known, member._pending = self._known, self._pending
