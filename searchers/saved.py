"""What a searcher keeps on disk, and how it goes on after its driver has died."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from ray_nascomp.errors import ConfigError
from ray_nascomp.observation_log import Record, snapshot_statuses, take_records
from ray_nascomp.observations import Observation
from ray_nascomp.searchers.recovery import plan_recovery
from ray_nascomp.searchers.state import read_state, write_state
from ray_nascomp.searchers.table import ObservationTable
from ray_nascomp.space import Space

logger = logging.getLogger(__name__)


class SavedSearcher(Searcher):
    """The part of `GoalSearcher` that saves, restores, and has lost trials suggested again."""

    rng: np.random.Generator
    observations: list[Observation]
    _space: Space | None
    _table: ObservationTable | None
    _keys: set[str]
    _pending: dict[str, dict[str, Any]]
    _reports: dict[str, dict[int, dict[str, Any]]]
    _points: list[dict[str, Any]]
    _lost: list[dict[str, Any]]
    _held: dict[str, Any] | None

    @property
    @abstractmethod
    def space(self) -> Space:
        """The space that is searched."""

    @abstractmethod
    def key(self, config: Mapping[str, Any]) -> str:
        """A text that configs with the same meaning share."""

    @abstractmethod
    def is_new(self, config: Mapping[str, Any]) -> bool:
        """Whether no trial has, or had, a config of the same meaning."""

    @abstractmethod
    def _next_of_its_own(self) -> dict[str, Any] | None:
        """What is suggested if nothing is lost."""

    @abstractmethod
    def _empty_table(self) -> ObservationTable:
        """A table without rows for the space."""

    @abstractmethod
    def _add_row(self, observation: Observation) -> None:
        """Puts an observation into the table."""

    def save(self, checkpoint_path: str) -> None:
        """Writes the whole state as lines of JSON."""
        tail = {
            "pending": self._pending,
            "reports": self._reports,
            "points": self._points,
            "lost": self._lost,
            "held": self._held,
            "rng": self.rng.bit_generator.state,
            "own": self.own_state(),
        }
        head = {"space": self._space.to_dict() if self._space is not None else None}
        write_state(checkpoint_path, head, self.observations, tail)

    def restore(self, checkpoint_path: str) -> None:
        """Goes on from what `save` has written; from a file cut short, with what is whole of it.

        Raises:
            ConfigError: If nothing of it is.
        """
        head, self.observations, tail = read_state(checkpoint_path)
        if self._space is None and head["space"] is not None:
            self._space = Space.from_dict(head["space"])
        self._pending = tail.get("pending", {})
        self._reports = {
            trial_id: {int(iteration): metrics for iteration, metrics in reports.items()}
            for trial_id, reports in tail.get("reports", {}).items()
        }
        self._points = tail.get("points", self._points)
        self._lost, self._held = tail.get("lost", []), tail.get("held")
        if "rng" in tail:
            self.rng.bit_generator.state = tail["rng"]
        self.load_own_state(tail.get("own") or self.own_state())
        self._index()

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Restores from Tune's copy of an experiment's folder: own state, snapshot, and observation log.

        Raises:
            RuntimeError: If no state in the folder can be read.
        """
        folder = Path(checkpoint_dir)
        for path in sorted(folder.glob(self.CKPT_FILE_TMPL.format("*")), reverse=True):
            try:
                self.restore(str(path))
                break
            except ConfigError as error:
                logger.warning("%s; an earlier one is taken", error)
        else:
            raise RuntimeError(f"{type(self).__name__} finds no state in {folder} that can be read")
        snapshot = max(folder.glob("experiment_state-*.json"), default=None)
        records = take_records(folder)
        if snapshot is not None:
            self._recover(records, snapshot_statuses(snapshot.read_text(errors="replace")))

    def take_up(self, records: Sequence[Record]) -> None:
        """Has what the observation log knows suggested again, for a search that starts anew in its folder."""
        self._lost = [dict(record.config) for record in records]

    def own_state(self) -> dict[str, Any]:
        """What a searcher keeps beyond the observations, as plain values."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes back what `own_state` has given."""

    def _next_lost(self) -> dict[str, Any] | None:
        """A config that the log knows and Tune has lost; its trial answers from the log.

        The searcher's own next proposal comes first if it is one of them, so that a search of one
        trial at a time takes the way it took before; if not, it is held until they are through.
        """
        self._lost = [config for config in map(self.space.canonical, self._lost) if self.is_new(config)]
        if not self._lost:
            return None
        self._held = self._held or self._next_of_its_own()
        keys = [self.key(config) for config in self._lost]
        if self._held is None or self.key(self._held) not in keys:
            return self._lost.pop(0)
        config, self._held = self._lost.pop(keys.index(self.key(self._held))), None
        return config

    def _index(self) -> None:
        """Rebuilds what follows from observations and running trials."""
        if self._space is not None:
            configs = [*(o.config for o in self.observations), *self._pending.values()]
            self._keys = {self.key(config) for config in configs}
            self._table = self._empty_table()
            for observation in self.observations:
                self._add_row(observation)

    def _recover(self, records: Sequence[Record], statuses: Mapping[str, str]) -> None:
        plan = plan_recovery(records, statuses, self.observations, self._pending)
        self.observations = [o for o in self.observations if o.trial_id not in plan.forget]
        self._pending = {trial_id: c for trial_id, c in self._pending.items() if trial_id not in plan.forget}
        self._pending.update({trial_id: self.space.canonical(c) for trial_id, c in plan.resume.items()})
        if plan.forget or plan.resume:
            self.load_own_state(self.own_state())
            self._index()
        for record, is_error in plan.complete:
            self._pending.setdefault(record.trial_id, self.space.canonical(record.config))
            for iteration, report in record.reports.items():
                self.on_trial_result(record.trial_id, {**report, "training_iteration": iteration})
            last = max(record.reports, default=0)
            result = {**record.reports.get(last, {}), "training_iteration": last}
            self.on_trial_complete(record.trial_id, None if is_error else result, error=is_error)
        self._lost = [*map(dict, plan.lost), *self._lost]
        if self._lost:
            logger.info("%d trials that Tune has lost are taken from the observation log", len(self._lost))
