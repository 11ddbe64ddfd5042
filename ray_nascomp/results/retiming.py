"""Speed measured again once a search is over: trials measure it while others train beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.fs
from rich.console import Console
from rich.progress import track

from ray_nascomp.goals import Goal
from ray_nascomp.results.loading import LATENCY_FILE, TrialRecord
from ray_nascomp.results.selected import SelectedModel

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task


def time_again(
    trials: Iterable[TrialRecord], goal: Goal, filesystem: pyarrow.fs.FileSystem, task: Task | None, progress: bool
) -> dict[str, dict[str, Any]]:
    """Trial id -> latency_ms, speedup, speedup_spread and score, of the trials' files one after another.

    Args:
        trials: Trials that kept their files.
        goal: What scores them.
        filesystem: Where the files lie.
        task: Their task; found by itself if it is alive in this process.
        progress: Whether a bar on stderr shows how far it is.

    Raises:
        ConfigError: If there is no task, or it is another one, or a file is missing.
    """
    from ray_nascomp.pipeline.measure import latency_of
    from ray_nascomp.pipeline.report import latency_metrics
    from ray_nascomp.tasks.known import task_of

    models = [SelectedModel.from_trial(trial, goal, filesystem) for trial in trials]
    console = Console(stderr=True)
    measured: dict[str, dict[str, Any]] = {}
    for model in track(models, "timing the results again", console=console, disable=not progress):
        latency = latency_of(model.content(), task_of(str(model.metrics.get("task", "")), task))
        metrics: dict[str, Any] = latency_metrics(latency)
        measured[model.trial_id] = {**metrics, "score": goal.score({**model.metrics, **metrics})}
    return measured


def keep(path: str, filesystem: pyarrow.fs.FileSystem, measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Keeps in an experiment's folder what was measured again; whatever reads the folder has it."""
    with filesystem.open_output_stream(f"{path}/{LATENCY_FILE}") as stream:
        stream.write(json.dumps(measured, indent=1).encode())
