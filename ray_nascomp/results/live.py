"""A search as it goes: a line for each trial that ends; in a terminal, the front below them."""

from __future__ import annotations

import atexit
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ray_nascomp.goals import Goal, as_float
from ray_nascomp.results.progress import Progress, duration

_ROWS = 8


class FrontReporter(tune.Callback):
    """A Tune callback that shows what each trial came to, and the front so far.

    Give it to `tune.RunConfig(callbacks=[...], verbose=0)`. In a terminal a table below the
    lines stays up to date; in a log file there are the lines alone, and a summary at the end.

    Args:
        goal: Objectives and constraints, whose metrics are shown.
        num_samples: How many trials there will be, for the estimate of the time left; Tune's
            own number if absent.
        stderr: Whether it writes to stderr, and leaves stdout to what is piped on.
    """

    def __init__(self, goal: Goal, num_samples: int | None = None, *, stderr: bool = False) -> None:
        self._goal = goal
        self._stderr = stderr
        self._num_samples = num_samples
        self._last: dict[str, dict[str, Any]] = {}
        self._progress = Progress(goal)
        # Made when the search begins: neither can be pickled with it.
        self._console: Console | None = None
        self._live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_console": None, "_live": None}

    def setup(
        self, stop: Any = None, num_samples: int | None = None, total_num_samples: int | None = None, **info: Any
    ) -> None:
        """The search begins."""
        self._progress = Progress(self._goal)
        total = self._num_samples or total_num_samples or num_samples
        self._progress.total = total if total is not None and 0 < total < math.inf else None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        self._refresh(trials)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Remembers the last report."""
        self._last[trial.trial_id] = dict(result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended by itself or was stopped."""
        self._end(trial, "TERMINATED", trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed for good, or is about to be tried again."""
        if trial.status == "ERROR":
            self._end(trial, "ERROR", trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """The search is over."""
        self._refresh(trials)
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._progress.ended:
            self._print(Text(self._summary(0)))

    def _end(self, trial: Any, tune_status: str, trials: list[Any]) -> None:
        metrics = self._last.pop(trial.trial_id, {})
        status = self._progress.end(trial.trial_id, metrics, tune_status)
        mark = "  [bold green]on the front[/]" if trial.trial_id in self._progress.front() else ""
        if status in ("completed", "stopped"):
            values = {name: as_float(metrics.get(name)) for name in self._goal.metrics}
            what = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if math.isfinite(value))
        else:
            what = str(metrics.get("reason", "")) or _error_of(trial)
        total = f"/{self._progress.total}" if self._progress.total else ""
        left = self._progress.left
        clock = duration(self._progress.elapsed) + ("" if left is None else f" +{duration(left)}")
        self._print(f"[dim]{self._progress.ended:>4}{total} {clock:>14}[/]  {status:<10}  {escape(what)}{mark}")
        self._refresh(trials)

    @property
    def _screen(self) -> Console:
        if self._console is None:
            self._console = Console(highlight=False, soft_wrap=True, stderr=self._stderr)
        return self._console

    def _print(self, line: str | Text) -> None:
        self._screen.print(line, soft_wrap=True)

    def _refresh(self, trials: list[Any]) -> None:
        if not self._screen.is_terminal:
            return
        if self._live is None:
            self._live = Live(console=self._screen, auto_refresh=False, redirect_stderr=False)
            self._live.start()
            atexit.register(self._live.stop)  # An aborted search must not leave the cursor hidden.
        running = sum(trial.status == "RUNNING" for trial in trials)
        self._live.update(Group(Text(self._summary(running)), self._table()), refresh=True)

    def _summary(self, running: int) -> str:
        progress = self._progress
        counts: list[tuple[str, int]] = [("running", running), *progress.counts.items()]
        states = ", ".join(f"{count} {status}" for status, count in counts if count) or "none"
        left = progress.left
        time_left = "" if left is None or not running else f", about {duration(left)} left"
        total = f" of {progress.total}" if progress.total else ""
        return (
            f"{progress.ended}{total} trials in {duration(progress.elapsed)}{time_left}: {states}; "
            f"{len(progress.front())} on the front, hypervolume {progress.hypervolume():.3f}"
        )

    def _table(self) -> Table:
        table = Table(title=None, box=None, pad_edge=False)
        table.add_column("front", no_wrap=True)
        for name in self._goal.metrics:
            table.add_column(name, justify="right", overflow="ellipsis", no_wrap=True)
        front = list(self._progress.front().items())
        for trial_id, metrics in front[:_ROWS]:
            table.add_row(escape(trial_id), *_values(self._goal, metrics))
        if len(front) > _ROWS:
            table.add_row(f"and {len(front) - _ROWS} more")
        return table


def _error_of(trial: Any) -> str:
    """The last line of a trial's error, "" if it cannot be read."""
    try:
        lines = Path(trial.error_file).read_text(errors="replace").strip().splitlines()
    except (OSError, TypeError):
        return ""
    return lines[-1] if lines else ""


def _values(goal: Goal, metrics: Mapping[str, Any]) -> list[str]:
    return [f"{as_float(metrics.get(name)):.4g}" for name in goal.metrics]
