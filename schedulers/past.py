"""What a trial reported before its experiment was restored, or before it was paused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs
from ray.tune.experiment import Trial
from ray.tune.utils import flatten_dict


def past_results(trial: Trial) -> list[Mapping[str, Any]]:
    """A trial's earlier reports, oldest first, flat as schedulers get them; none for a new one.

    Tune carries the last report through a restore. Those before it are in the file of its JSON
    logger, if there is one; a torn line is passed over.
    """
    last = getattr(trial, "last_result", None) or {}
    if not set(last) - {"trial_id"}:  # Which a new trial has as well.
        return []
    return [flatten_dict(dict(result)) for result in (*_logged(trial), last)]


def _logged(trial: Trial) -> list[Mapping[str, Any]]:
    storage = getattr(trial, "storage", None)
    if storage is None or not storage.trial_dir_name:
        return []
    path = str(PurePosixPath(storage.trial_fs_path) / "result.json")
    try:
        with storage.storage_filesystem.open_input_stream(path) as stream:
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    results: list[Mapping[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            results.append(row)
    return results


def keep_reports(trial: Trial) -> None:
    """Copies a paused trial's reports to the experiment's folder, before it goes on.

    Tune's JSON logger then starts from the copy there, which may be minutes old: what a trial had
    reported since would be lost.
    """
    storage = getattr(trial, "storage", None)
    if storage is None or not storage.trial_dir_name or trial.local_path is None:
        return
    local = Path(trial.local_path, "result.json")
    if local.exists():
        remote = str(PurePosixPath(storage.trial_fs_path) / "result.json")
        storage.storage_filesystem.create_dir(str(storage.trial_fs_path), recursive=True)
        pyarrow.fs.copy_files(
            str(local),
            remote,
            source_filesystem=pyarrow.fs.LocalFileSystem(),
            destination_filesystem=storage.storage_filesystem,
        )
