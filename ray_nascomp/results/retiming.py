"""Speed measured again once a search is over: trials measure it while others train beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow.fs

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal
from ray_nascomp.results.loading import TrialRecord
from ray_nascomp.results.progress import counted
from ray_nascomp.results.selected import SelectedModel

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task

logger = logging.getLogger(__name__)

# Tune puts the files that end in .json back, as they were, when a search is restored.
_FILE = "latency.jsonl"


def time_again(
    trials: Sequence[TrialRecord], goal: Goal, filesystem: pyarrow.fs.FileSystem, task: Task | None, progress: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    """Times the trials' files one after another; yields trial ids with latency_ms, speedup and speedup_spread.

    A trial without a file is left out, with a warning.

    Args:
        trials: Completed trials.
        goal: What the search was after.
        filesystem: Where the files lie.
        task: Their task; found by itself if it is alive in this process.
        progress: Whether stderr shows how far it is.

    Raises:
        ConfigError: If none has a file, there is no task, or it is another one, or the trials were timed on nodes of
            their own.
    """
    from ray_nascomp.pipeline.measure import latency_of
    from ray_nascomp.pipeline.report import latency_metrics
    from ray_nascomp.tasks.known import task_of

    if any(trial.metrics.get("timed_elsewhere") for trial in trials):
        raise ConfigError("retime: the trials were timed on nodes with latency_resources; this machine is another")
    models = [SelectedModel.from_trial(trial, goal, filesystem) for trial in trials]
    models = [model for model in models if model.has_file]
    if not models:
        raise ConfigError(f"retime: none of {len(trials)} completed trials has kept a file; compression_trainable's do")
    if len(models) < len(trials):
        logger.warning(
            "%d of %d completed trials have no file and keep their times", len(trials) - len(models), len(trials)
        )
    tasks = [task_of(str(model.metrics.get("task", "")), task) for model in models]
    for model, its_task in counted(list(zip(models, tasks, strict=True)), "timing the results again", progress):
        yield model.trial_id, latency_metrics(latency_of(model.content(), its_task))


def with_times(trial: TrialRecord, times: Mapping[str, float]) -> TrialRecord:
    """The trial with other times in its last report, and the score that follows from them."""
    if not times or not trial.rows:
        return trial
    before = trial.metrics
    after = {**before, **times}
    goal = Goal.from_json(before["goal"]) if isinstance(before.get("goal"), str) else None
    # A trainable of one's own may report a score of its own.
    if goal is not None and before.get("score") == goal.score(before):
        after["score"] = goal.score(after)
    return replace(trial, rows=[*trial.rows[:-1], after])


def read_times(path: str, filesystem: pyarrow.fs.FileSystem) -> dict[str, dict[str, float]]:
    """Trial id -> what was measured again, from an experiment's folder; what cannot be read is left out."""
    try:
        with filesystem.open_input_stream(f"{path}/{_FILE}") as stream:
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {row["trial_id"]: row["times"] for row in map(_parsed, lines) if row is not None}


def keep_times(path: str, filesystem: pyarrow.fs.FileSystem, times: Mapping[str, Mapping[str, float]]) -> None:
    """Keeps in an experiment's folder what was measured again, beside what is there of other trials."""
    every = {**read_times(path, filesystem), **times}
    lines = [json.dumps({"trial_id": trial_id, "times": row}) + "\n" for trial_id, row in every.items()]
    try:
        with filesystem.open_output_stream(f"{path}/{_FILE}") as stream:
            stream.write("".join(lines).encode())
    except OSError as error:
        logger.warning("the new times are known to these results alone: %s", error)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_whole = isinstance(row, dict) and isinstance(row.get("trial_id"), str) and isinstance(row.get("times"), dict)
    return row if is_whole else None
