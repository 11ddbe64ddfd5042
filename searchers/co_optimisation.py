"""Co-optimisation of architecture and compression by blocks of dimensions, around any searcher.

In turn, one block is searched while the other dimensions keep the values of a result on the front:
stage after stage as in the usual practice of compressing what a search of architectures has found,
alternately as in block coordinate descent, or by what has paid off. All results are learnt from,
whichever block was searched.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal
from ray_nascomp.observations import Observation
from ray_nascomp.pareto import ranks
from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.blocks import HeldSpace, find_blocks, uncompressed
from ray_nascomp.searchers.credit import Credit, hypervolume_gain
from ray_nascomp.searchers.evolutionary import EvolutionarySearch
from ray_nascomp.searchers.hybrid import MakeMember
from ray_nascomp.searchers.known_costs import CostFunction

_PROPOSALS = 4
_SAMPLES = 16


class BlockSearch(GoalSearcher):
    """What the searches by blocks share; each says whose turn it is.

    Args:
        goal: See `GoalSearcher`.
        cost_model: See `GoalSearcher`.
        searcher: A searcher's class, or a function `(goal, cost_model, *, seed)` that makes one; None
            stands for `EvolutionarySearch`.
        blocks: Name of each block -> beginnings of its keys, joined by "/", such as
            `{"architecture": ["architecture"], "rest": ["prune", "quantize", "finetune"]}`. None stands
            for architecture and everything else, or the space's sections where it has no architecture.
        seed: See `GoalSearcher`.
        points_to_evaluate: See `GoalSearcher`.
        warm_start: See `GoalSearcher`.
    """

    def __init__(
        self,
        goal: Goal,
        cost_model: CostFunction | None = None,
        *,
        searcher: MakeMember | None = None,
        blocks: Mapping[str, Sequence[str]] | None = None,
        seed: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        warm_start: Iterable[Observation] | str | Path | Any = None,
    ) -> None:
        super().__init__(goal, cost_model, seed=seed, points_to_evaluate=points_to_evaluate, warm_start=warm_start)
        self._searcher = (searcher or EvolutionarySearch)(goal, cost_model, seed=int(self.rng.integers(2**31)))
        self._prefixes = blocks
        self._blocks: dict[str, np.ndarray] = {}
        self._author: dict[str, str] = {}
        self._spent: dict[str, int] = {}

    @abstractmethod
    def turn(self) -> str:
        """Name of the block that is searched next."""

    @property
    def blocks(self) -> dict[str, np.ndarray]:
        """Name of each block -> which dimensions it holds, shape `(dimensions,)`."""
        if not self._blocks:
            self._blocks = find_blocks(self.space, self._prefixes)
        return self._blocks

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Takes over Tune's `param_space`.

        Raises:
            ConfigError: As `GoalSearcher`; if a block's key is unknown, a dimension in none, or there is one block.
        """
        taken = super().set_search_properties(metric, mode, config, **spec)
        return taken and len(self.blocks) > 0

    def trials_of(self, block: str) -> int:
        """Number of trials, running ones included, in which a block was searched."""
        return self._spent.get(block, 0) + sum(author == block for author in self._author.values())

    def propose(self) -> dict[str, Any]:
        """The wrapped searcher's config within the block whose turn it is; where that is used up, within another."""
        held = self._incumbent()
        first = self.turn()
        for block in (first, *(name for name in self.blocks if name != first)):
            config = self._within(block, HeldSpace(self.space, self.blocks[block], held))
            if config is not None:
                self._author[self.key(config)] = block
                return config
        return self.space.sample(self.rng)

    def observed(self, observation: Observation, reports: Mapping[int, Mapping[str, Any]]) -> None:
        """The wrapped searcher hears of it, and its block has had a trial."""
        block = self._author.pop(self.key(observation.config), None)
        if block is not None:
            self._spent[block] = self._spent.get(block, 0) + 1
            self.paid(block)
        self._share(self.space)
        self._searcher.observations.append(observation)
        self._searcher.observed(observation, reports)

    def paid(self, block: str) -> None:
        """Called when a trial of a block has ended; it is the newest observation."""

    def own_state(self) -> dict[str, Any]:
        """Whose trials run, how many each block had, and the wrapped searcher's own state."""
        wrapped = {"rng": self._searcher.rng.bit_generator.state, "own": self._searcher.own_state()}
        return {"author": self._author, "spent": self._spent, "wrapped": wrapped}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self._author, self._spent = state["author"], state["spent"]
        self._share(self._space)
        self._searcher.rng.bit_generator.state = state["wrapped"]["rng"]
        self._searcher.observations = list(self.observations)
        self._searcher.load_own_state(state["wrapped"]["own"])

    def _within(self, block: str, space: HeldSpace) -> dict[str, Any] | None:
        """A new and affordable config of the block; None if none was found."""
        self._share(space)
        for number in range(_PROPOSALS + _SAMPLES):
            config = self._searcher.propose() if number < _PROPOSALS else space.sample(self.rng)
            if self.is_new(config) and self.known_metrics(config) is not None:
                return config
        return None

    def _incumbent(self) -> list[Any]:
        """One value a dimension of a random member of the front; before the first result of an uncompressed model."""
        positions = self.final_positions()
        _, losses, violations = self.table(positions)
        usable = np.isfinite(losses).all(axis=1)
        if not usable.any():
            return [uncompressed(dimension, self.rng) for dimension in self.space.dimensions]
        front = np.flatnonzero(usable & (ranks(losses, violations) == 0))
        chosen = positions[int(self.rng.choice(front))]
        return self.space.values(self.observations[chosen].config)

    def _share(self, space: Any) -> None:
        """Rows, keys, known costs and pending trials are the same objects for the wrapped searcher."""
        wrapped = self._searcher
        wrapped._space, wrapped._table, wrapped._keys = space, self._table, self._keys
        wrapped._known, wrapped._pending = self._known, self._pending


class MultiStageSearch(BlockSearch):
    """One block after the other: by default the architecture, then the compression of the best ones.

    In the first stage nothing is compressed. Each later stage starts from the front of those before.

    Args:
        goal: See `BlockSearch`.
        cost_model: See `BlockSearch`.
        stage_trials: Number of trials of each stage but the last, 1 or more.
        **options: See `BlockSearch`.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(self, goal: Goal, cost_model: CostFunction | None = None, *, stage_trials: int = 24, **options: Any):
        if stage_trials < 1:
            raise ConfigError(f"stage_trials: {stage_trials!r} was given, 1 or more is allowed")
        super().__init__(goal, cost_model, **options)
        self._stage_trials = stage_trials

    def turn(self) -> str:
        """The first block that has not had its trials."""
        names = list(self.blocks)
        return next((name for name in names[:-1] if self.trials_of(name) < self._stage_trials), names[-1])


class IterativeSearch(BlockSearch):
    """Blocks in turn, some trials each, over and over.

    Args:
        goal: See `BlockSearch`.
        cost_model: See `BlockSearch`.
        period: Number of trials before the next block's turn, 1 or more.
        **options: See `BlockSearch`.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(self, goal: Goal, cost_model: CostFunction | None = None, *, period: int = 8, **options: Any) -> None:
        if period < 1:
            raise ConfigError(f"period: {period!r} was given, 1 or more is allowed")
        super().__init__(goal, cost_model, **options)
        self._period = period

    def turn(self) -> str:
        """The block after as many trials."""
        names = list(self.blocks)
        spent = sum(self.trials_of(name) for name in names)
        return names[spent // self._period % len(names)]


class AdaptiveSearch(BlockSearch):
    """Each trial to a block drawn by the hypervolume that its trials have added lately.

    Args:
        goal: See `BlockSearch`.
        cost_model: See `BlockSearch`.
        **options: See `BlockSearch`.
    """

    def __init__(self, goal: Goal, cost_model: CostFunction | None = None, **options: Any) -> None:
        super().__init__(goal, cost_model, **options)
        self._credit = Credit()

    def turn(self) -> str:
        """A block, by chance that follows its credit."""
        return self._credit.draw(self.rng, list(self.blocks))

    def paid(self, block: str) -> None:
        """Its credit follows what the newest observation adds to the hypervolume."""
        self._credit.add(block, hypervolume_gain(self))

    def own_state(self) -> dict[str, Any]:
        """That of all searches by blocks, and the credit."""
        return {**super().own_state(), "credit": self._credit.values}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        super().load_own_state(state)
        self._credit = Credit(state["credit"])
