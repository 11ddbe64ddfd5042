"""An experiment read from its folder: from JSON alone, nothing is unpickled."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.fs
from ray.tune.utils import flatten_dict

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal, as_float, says_infeasible
from ray_nascomp.observation_log import snapshot_statuses

if TYPE_CHECKING:
    from ray.tune import ResultGrid

logger = logging.getLogger(__name__)

TrialStatus = Literal["completed", "stopped", "infeasible", "failed", "unfinished"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        trial_id: Tune's id.
        config: The config, nested.
        rows: Its reports, oldest first.
        status: How it ended.
        error: Text of the error, "" if there was none.
        path: The trial's folder, within the experiment's file system.
        checkpoint: Its last checkpoint's folder, None if there is none.
    """

    trial_id: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)
    status: TrialStatus = "unfinished"
    error: str = ""
    path: str = ""
    checkpoint: str | None = None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The last report; empty if there is none."""
        return self.rows[-1] if self.rows else {}


def read_experiment(path: str, filesystem: pyarrow.fs.FileSystem) -> list[TrialRecord]:
    """All trials of an experiment, in the order of their start.

    Args:
        path: The experiment's folder.
        filesystem: Where it lies.

    Raises:
        ConfigError: If the folder does not exist or holds no trial.
    """
    selector = pyarrow.fs.FileSelector(path, allow_not_found=True)
    entries = filesystem.get_file_info(selector)
    if not entries:
        raise ConfigError(f"{path} is not the folder of an experiment: it is empty or does not exist")
    statuses = _tune_statuses(entries, filesystem)
    records = []
    for entry in entries:
        if entry.type is pyarrow.fs.FileType.Directory:
            record = _read_trial(entry.path, filesystem, statuses)
            if record is not None:
                records.append(record)
    if not records:
        raise ConfigError(f"{path} holds no trial: none of its folders has a params.json")
    places = {trial_id: place for place, trial_id in enumerate(statuses)}  # Tune lists them as they began.
    return sorted(
        _without_lost(records, statuses), key=lambda r: (places.get(r.trial_id, len(places)), _start(r), r.trial_id)
    )


def read_grid(grid: ResultGrid) -> list[TrialRecord]:
    """All trials of what `Tuner.fit` returned, in the order of their start."""
    if len(grid) and grid.num_errors == len(grid):
        # What an earlier search left in the folder would hide it.
        reason = (str(grid.errors[0]).strip() or repr(grid.errors[0])).splitlines()[-1]
        logger.warning("all %d trials of this search failed, the first with: %s", len(grid), reason)
    try:
        return read_experiment(grid.experiment_path, grid.filesystem)
    except (ConfigError, OSError):
        # Without Tune's JSON logger there are no files: the last reports are all there is.
        return [_record_of(grid[i]) for i in range(len(grid))]


def _record_of(result: Any) -> TrialRecord:
    metrics = {key: value for key, value in (result.metrics or {}).items() if key != "config"}
    rows = [metrics] if metrics else []
    error = str(result.error) if result.error else ""
    status = status_of(rows, "ERROR" if error else "TERMINATED", error)
    checkpoint = result.checkpoint.path if result.checkpoint else None
    return TrialRecord(
        str(metrics.get("trial_id", "")), result.config or {}, rows, status, error, result.path, checkpoint
    )


def _start(record: TrialRecord) -> float:
    """When a trial began, by its first report; 0 without one."""
    first = record.rows[0] if record.rows else {}
    return float(first.get("timestamp", 0) - first.get("time_total_s", 0))


def judged(trial: TrialRecord, goal: Goal) -> TrialRecord:
    """The trial, failed with a reason if it ended with a value that the goal cannot be judged by."""
    if trial.status != "completed":
        return trial
    wrong = {m: trial.metrics.get(m) for m in goal.metrics if not math.isfinite(as_float(trial.metrics.get(m)))}
    if not wrong:
        return trial
    reports = ", ".join(f"{metric}={value!r}" for metric, value in wrong.items())
    return replace(trial, status="failed", error=f"the last report has {reports}: finite numbers are needed")


def _without_lost(records: list[TrialRecord], statuses: Mapping[str, str]) -> list[TrialRecord]:
    """Without the folders of trials that a dead driver lost, and that were run again under another name."""
    known = {json.dumps(r.config, sort_keys=True) for r in records if _is_known(r, statuses)}
    return [r for r in records if _is_known(r, statuses) or json.dumps(r.config, sort_keys=True) not in known]


def _is_known(record: TrialRecord, statuses: Mapping[str, str]) -> bool:
    # Without a report there is only the folder's name, which holds the id unless the user names folders.
    return bool({record.trial_id, *PurePosixPath(record.path).name.split("_")} & statuses.keys())


def _read_trial(path: str, filesystem: pyarrow.fs.FileSystem, statuses: Mapping[str, str]) -> TrialRecord | None:
    names = {
        PurePosixPath(entry.path).name: entry.path for entry in filesystem.get_file_info(pyarrow.fs.FileSelector(path))
    }
    if "params.json" not in names:
        return None
    config = _parse(_read(filesystem, names["params.json"]))
    if not isinstance(config, dict):
        config = {}
    rows = []
    if "result.json" in names:
        for line in _read(filesystem, names["result.json"]).splitlines():
            row = _parse(line)  # The last line of an interrupted experiment may be torn.
            if isinstance(row, dict):
                rows.append(flatten_dict({key: value for key, value in row.items() if key != "config"}))
    error = _read(filesystem, names["error.txt"]).strip() if "error.txt" in names else ""
    checkpoints = sorted(name for name in names if name.startswith("checkpoint_"))
    trial_id = str(rows[-1].get("trial_id", "")) if rows else PurePosixPath(path).name
    status = status_of(rows, statuses.get(trial_id, ""), error)
    checkpoint = names[checkpoints[-1]] if checkpoints else None
    return TrialRecord(trial_id, config, rows, status, error if status == "failed" else "", path, checkpoint)


def status_of(rows: Sequence[Mapping[str, Any]], tune_status: str, error: str) -> TrialStatus:
    """How a trial ended, from its reports and what Tune says of it.

    Args:
        rows: The trial's reports.
        tune_status: Tune's own status, "" if unknown.
        error: Text of its error, "" if there was none.
    """
    last = rows[-1] if rows else {}
    if last.get("final") is True or (last and "final" not in last and last.get("done") is True):
        return "infeasible" if says_infeasible(last) else "completed"
    if tune_status == "ERROR" or (error and tune_status != "TERMINATED"):
        return "failed"
    if tune_status == "TERMINATED" and rows:
        return "stopped" if "final" in last else "completed"
    return "unfinished"


def _tune_statuses(entries: list[pyarrow.fs.FileInfo], filesystem: pyarrow.fs.FileSystem) -> dict[str, str]:
    """Trial id -> status from Tune's newest snapshot; empty if there is none that can be read."""
    snapshots = sorted(e.path for e in entries if PurePosixPath(e.path).name.startswith("experiment_state-"))
    return snapshot_statuses(_read(filesystem, snapshots[-1])) if snapshots else {}


def _read(filesystem: pyarrow.fs.FileSystem, path: str) -> str:
    with filesystem.open_input_stream(path) as stream:
        return stream.read().decode("utf-8", errors="replace")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
