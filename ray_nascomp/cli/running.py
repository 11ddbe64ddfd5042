"""A search started from the command line: Ray, the live view, and the results."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal

if TYPE_CHECKING:
    from ray_nascomp.results import Results
    from ray_nascomp.tasks.base import Task

NOTHING_FOUND = 3
"""Exit code of a search without a result that fulfils the limits."""


@dataclass(frozen=True)
class Effort:
    """How much a search may cost.

    Attributes:
        trials: Number of trials.
        epochs: Epochs of fine-tuning a trial.
        workers: Trials at a time, one core each.
        seconds: Time after which no trial goes on, None for no end.
        seed: Seed of the searcher.
    """

    trials: int
    epochs: int
    workers: int
    seconds: float | None = None
    seed: int | None = None


def workers_by_default() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_folder(folder: Path, resume: bool) -> None:
    """Checks, before anything is loaded, that a search can be put into a folder.

    Raises:
        ConfigError: If the folder holds a search and `resume` is not asked for, or the other way
            round.
    """
    from ray import tune

    folder = folder.expanduser().resolve()
    exists = tune.Tuner.can_restore(str(folder))
    if exists and not resume:
        raise ConfigError(f"output: {folder} holds a search already; --resume goes on with it, or give another folder")
    if resume and not exists:
        raise ConfigError(f"resume: {folder} holds no search to go on with")


def run_search(
    task: Task,
    goal: Goal,
    space: dict[str, Any],
    searcher: Any,
    scheduler: Any,
    effort: Effort,
    folder: Path,
    *,
    resume: bool = False,
) -> Results:
    """Runs a search in a Ray instance of its own, with a live view on stderr; the experiment lies in `folder`.

    Trials that ran on this machine are timed again once all are over.

    Where RAY_ADDRESS is set, that cluster is used, and `workers` trials run at a time on it.

    Where Ray runs in this process already, that instance is used and left running.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Its banner comes even where nothing is asked for.
    import ray
    from ray import tune

    from ray_nascomp import Results, compression_trainable, restore
    from ray_nascomp.results import FrontReporter

    folder = folder.expanduser().resolve()
    trainable = compression_trainable(task, goal, epochs=effort.epochs)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The live view tells of failed trials.
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # A Ray of this process's own, on this machine.
        options: dict[str, Any] = {"num_cpus": effort.workers, "include_dashboard": False}
    else:
        options = {"runtime_env": {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}}
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        if resume:
            tuner = restore(str(folder), trainable, param_space=space)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=space,
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=scheduler,
                    num_samples=effort.trials,
                    max_concurrent_trials=effort.workers,
                    time_budget_s=effort.seconds,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
                ),
                run_config=tune.RunConfig(
                    name=folder.name,
                    storage_path=str(folder.parent),
                    callbacks=[FrontReporter(goal, effort.trials, stderr=True)],
                    verbose=0,
                ),
            )
        with redirect_stdout(sys.stderr):
            results = Results(tuner.fit(), goal=goal)
    finally:
        if is_ours:
            ray.shutdown()
    if address == "local":
        results.retime(task)
    return results


class NothingFoundError(click.ClickException):
    """A search without a result that fulfils the limits."""

    exit_code = NOTHING_FOUND


def nothing_found(results: Results, reason: str) -> NothingFoundError:
    """The end of a search that found nothing, with what went wrong most often."""
    troubles = [trial.error or str(trial.metrics.get("reason") or "") for trial in results.trials]
    lines = [text.strip().splitlines()[-1] for text in troubles if text.strip()]
    often = max(set(lines), key=lines.count) if lines else ""
    return NothingFoundError(reason + (f"\nMost frequent trouble: {often}" if often else ""))
