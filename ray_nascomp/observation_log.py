"""The observation log: one small JSON record a config, in the experiment's folder, of all that its trial has reported.

A record is rewritten whole with each report: on a local disk by renaming, on an object store by
its atomic put. Readers may look at any time; what is torn all the same is passed over. Records
lie beside Tune's own state files, which is why Tune hands them to the searcher when an
experiment is restored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.fs

from ray_nascomp.errors import ConfigError

logger = logging.getLogger(__name__)

_PREFIX = "observation-"
_IDENTITY_FILE = "identity.json"
_FORMAT = 1


@dataclass
class Record:
    """What a config's trial has reported so far.

    Attributes:
        config: The trial's config, nested.
        trial_id: Tune's id of the trial.
        run: The run of the driver in which it was written.
        reports: Training iteration -> metrics, as the trainable gave them.
        checkpoint: The last checkpoint's folder, relative to the experiment's; "" if there is none.
        checkpoint_iteration: The training iteration of that checkpoint.
        time: Unix time of the last report, seconds; 0 before the first.
    """

    config: Mapping[str, Any]
    trial_id: str
    run: str = ""
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    checkpoint: str = ""
    checkpoint_iteration: int = 0
    time: float = 0.0

    @property
    def is_ended(self) -> bool:
        """Whether the last report is the trial's last."""
        last = self.reports[max(self.reports)] if self.reports else {}
        return bool(last.get("done")) or last.get("final") is True

    def to_json(self) -> str:
        """The record as text."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, default=plain)

    @classmethod
    def from_json(cls, text: str) -> Record | None:
        """The record of `to_json`; None for what is torn or something else."""
        try:
            data = json.loads(text)
            if data.pop("format") != _FORMAT:
                return None
            record = cls(**data)
            record.reports = {int(iteration): dict(metrics) for iteration, metrics in record.reports.items()}
            # A path in a file is not trusted to stay inside the experiment's folder.
            path = PurePosixPath(record.checkpoint)
            if path.is_absolute() or ".." in path.parts or not isinstance(record.config, dict):
                return None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return record


class ObservationLog:
    """The records of an experiment.

    Args:
        filesystem: Where the experiment lies.
        path: Its folder there.
    """

    def __init__(self, filesystem: pyarrow.fs.FileSystem, path: str) -> None:
        self.filesystem = filesystem
        self.path = path

    def read(self, config: Mapping[str, Any]) -> Record | None:
        """The record of a config, None if there is none that can be read."""
        text = self._read_text(f"{_PREFIX}{_key(config)}.json")
        return Record.from_json(text) if text is not None else None

    def write(self, record: Record) -> None:
        """Writes a record, in place of the config's earlier one.

        A storage that fails is the search's to survive: it loses this record's protection, and
        says so.
        """
        try:
            self._write_text(f"{_PREFIX}{_key(record.config)}.json", record.to_json())
        except OSError as error:
            logger.warning("the observation of trial %s could not be logged: %s", record.trial_id, error)

    def records(self) -> list[Record]:
        """All records, oldest first."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        names = [PurePosixPath(entry.path).name for entry in self.filesystem.get_file_info(selector)]
        texts = [self._read_text(name) for name in sorted(names) if _is_record(name)]
        return _in_order(text for text in texts if text is not None)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """States what the experiment's results are made from; the first trial's statement holds.

        Raises:
            ConfigError: If the folder holds results of something else.
        """
        text = self._read_text(_IDENTITY_FILE)
        try:
            known = json.loads(text) if text is not None else None
        except ValueError:
            known = None
        if known is None:
            try:
                self._write_text(_IDENTITY_FILE, json.dumps(dict(identity)))
            except OSError as error:
                logger.warning("%s could not be written: %s", _IDENTITY_FILE, error)
            return
        for name, value in identity.items():
            if known.get(name) != value:
                raise ConfigError(
                    f"{name}: {value!r} was given, but the results in {self.path} were made with "
                    f"{known.get(name)!r}; restore the search with that, or start it under another name"
                )

    def _read_text(self, name: str) -> str | None:
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
                return str(stream.read().decode("utf-8", errors="replace"))
        except OSError:
            return None

    def _write_text(self, name: str, text: str) -> None:
        target = f"{self.path}/{name}"
        # Object stores put a file whole or not at all; renaming is what makes that true of a disk.
        is_local = self.filesystem.type_name == "local"
        written = f"{self.path}/.{name}-{uuid.uuid4().hex[:8]}" if is_local else target
        with self.filesystem.open_output_stream(written) as stream:
            stream.write(text.encode())
        if is_local:
            self.filesystem.move(written, target)


def take_records(folder: Path) -> list[Record]:
    """The records among Tune's local copies of an experiment's files, oldest first; the copies go.

    Tune would upload them again with each of its snapshots, over what trials have written since.
    """
    texts = []
    for path in sorted(folder.glob(f"{_PREFIX}*.json")):
        texts.append(path.read_text(errors="replace"))
        path.unlink()
    return _in_order(texts)


def snapshot_statuses(text: str) -> dict[str, str]:
    """Trial id -> status, from the text of Tune's snapshot; empty if it cannot be read."""
    try:
        entries = json.loads(text)["trial_data"]
        trials = [json.loads(entry[0]) for entry in entries]
        return {str(trial["trial_id"]): str(trial["status"]) for trial in trials}
    except (ValueError, TypeError, KeyError, IndexError):
        return {}


def plain(value: Any) -> Any:
    """For `json.dumps`: numpy's and torch's scalars become Python's, all else its text."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    item = getattr(value, "item", None)
    try:
        return item() if callable(item) else str(value)
    except (ValueError, RuntimeError):
        return str(value)


def _key(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=plain).encode()).hexdigest()[:24]


def _is_record(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(".json")


def _in_order(texts: Iterable[str]) -> list[Record]:
    records = [record for record in map(Record.from_json, texts) if record is not None]
    return sorted(records, key=lambda record: (record.time, record.trial_id))
