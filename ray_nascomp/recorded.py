"""Trainables whose reports outlive the driver: each goes into the observation log, and is answered from there.

Tune snapshots a search every ten seconds or more; what trials have reported since the last
snapshot is lost with the driver. A recorded trial that is run again, because the snapshot did not
know of it or of its end, repeats its reports from the log instead of computing them.
"""

from __future__ import annotations

import copy
import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs
from ray import tune

from ray_nascomp.errors import ConfigError
from ray_nascomp.observation_log import ObservationLog, Record

logger = logging.getLogger(__name__)

_END = {"__duplicate__": True, "done": True}
_ANSWERED_FILE = "answered-from-the-log"


def recorded(trainable: type[tune.Trainable], identity: Mapping[str, Any] | None = None) -> type[tune.Trainable]:
    """A class trainable whose reports are kept in the observation log, and never computed twice.

    Reports of an earlier run of the driver are answered by config; a trial that Tune runs again in
    the same run, after a fault, is answered what it had reported itself. A config that two trials
    of one run share is computed by each. If a checkpoint cannot be loaded, the trial starts over.

    Args:
        trainable: A class trainable. Its last report should say `final: True` or `done: True`.
        identity: What its results follow from besides the config, as plain values; a folder that
            holds results of something else is refused by a trial's setup.

    Raises:
        ConfigError: If `trainable` is not a class.
    """
    if not (isinstance(trainable, type) and issubclass(trainable, tune.Trainable)):
        raise ConfigError(f"trainable: {trainable!r} was given, a class derived from tune.Trainable is allowed")

    class Recorded(trainable):  # type: ignore[misc, valid-type]
        identity: Mapping[str, Any] | None
        run: str
        _log: ObservationLog | None
        _record: Record
        _inner_iteration: int

        def setup(self, config: dict[str, Any], **parameters: Any) -> None:
            self._open_record(config)
            super().setup(config, **parameters)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._open_record(new_config)
            return bool(super().reset_config(new_config))

        def step(self) -> dict[str, Any]:
            if self._storage is None:  # Outside of Tune nobody counts iterations.
                return dict(super().step())
            iteration = self._iteration + 1
            if iteration in self._record.reports:
                return dict(self._record.reports[iteration])
            if self._record.is_ended and iteration > max(self._record.reports):
                return dict(_END)
            self._catch_up()
            result: dict[str, Any] = super().step()
            if "__duplicate__" not in result:
                self._inner_iteration = iteration
                self._record.reports[iteration] = dict(result)
                self._record.time = time.time()
                self._write_record()
            return result

        def save(self, checkpoint_dir: str | None = None) -> Any:
            saved = super().save(checkpoint_dir)
            if self._log is not None and not self._is_ahead():
                path = PurePosixPath(saved.checkpoint.path)
                if path.is_relative_to(self._log.path):
                    self._record.checkpoint = str(path.relative_to(self._log.path))
                    self._record.checkpoint_iteration = self._iteration
                    self._write_record()
            return saved

        def save_checkpoint(self, checkpoint_dir: str) -> Any:
            if self._storage is None:
                return super().save_checkpoint(checkpoint_dir)
            if self._inner_iteration < self._iteration:
                if self._record.checkpoint_iteration == self._iteration and self._fetch(checkpoint_dir):
                    return checkpoint_dir
                if self._is_ahead():  # More answers follow: whoever loads this starts over and repeats them.
                    (Path(checkpoint_dir) / _ANSWERED_FILE).touch()
                    return checkpoint_dir
            self._catch_up()
            return super().save_checkpoint(checkpoint_dir)

        def load_checkpoint(self, checkpoint: Any) -> None:
            if isinstance(checkpoint, str) and (Path(checkpoint) / _ANSWERED_FILE).exists():
                self._start_over()
                return
            try:
                super().load_checkpoint(checkpoint)
                self._inner_iteration = self._iteration
            except Exception as error:  # Whatever a damaged file makes of its reader.
                logger.warning("a checkpoint cannot be loaded, the trial starts over: %s", error)
                self._start_over()

        def _open_record(self, config: dict[str, Any]) -> None:
            storage, self._inner_iteration = self._storage, 0
            self._log = ObservationLog(storage.storage_filesystem, storage.experiment_fs_path) if storage else None
            self._record = Record(copy.deepcopy(config), self.trial_id, self.run)
            if self._log is None:
                return
            if identity is not None:
                self._log.claim(identity)
            known = self._log.read(config)
            if known is None:
                return
            if known.run == self.run and known.trial_id != self.trial_id:
                self._log = None  # The config is another trial's, which keeps its record.
                return
            known.trial_id, known.run = self.trial_id, self.run
            self._record = known
            self._write_record()

        def _is_ahead(self) -> bool:
            """Whether the record holds answers that are still to be given."""
            return max(self._record.reports, default=0) > self._iteration

        def _write_record(self) -> None:
            if self._log is not None:
                self._log.write(self._record)

        def _start_over(self) -> None:
            if not super().reset_config(self.config):
                self.setup(copy.deepcopy(self.config))
            self._inner_iteration = 0

        def _catch_up(self) -> None:
            """Brings the trainable to where its answered reports are."""
            while self._inner_iteration < self._iteration:
                super().step()
                self._inner_iteration += 1

        def _fetch(self, folder: str) -> bool:
            """Copies the recorded checkpoint into a folder; whether it was there."""
            if self._log is None or not self._record.checkpoint:
                return False
            source = f"{self._log.path}/{self._record.checkpoint}"
            try:
                pyarrow.fs.copy_files(source, folder, source_filesystem=self._log.filesystem)
            except OSError:
                return False
            return any(Path(folder).iterdir())

    Recorded.identity, Recorded.run = identity, new_run()
    Recorded.__name__ = Recorded.__qualname__ = trainable.__name__
    Recorded.__doc__ = trainable.__doc__
    return Recorded


def new_run() -> str:
    """Names a run of the driver: what an earlier one has logged is answered, the same one's repetitions are not."""
    return uuid.uuid4().hex
