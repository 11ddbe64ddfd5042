"""A search as it goes: a line for each trial that ends; in a terminal, the front below them."""

from __future__ import annotations

import atexit
import math
from pathlib import Path
from typing import Any

from ray import tune
from rich.box import MINIMAL
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from ray_nascomp.goals import Goal
from ray_nascomp.results.live_view import summary, trial_line, values_text, view
from ray_nascomp.results.progress import Progress


class FrontReporter(tune.Callback):
    """A Tune callback that shows what each trial came to, and the front so far.

    Give it to `tune.RunConfig(callbacks=[...], verbose=0)`. In a terminal the hypervolume and the
    front stay up to date below the lines, in a notebook in the cell's output; in a log file there
    are the lines alone, and a summary at the end.

    Each report gets two more keys, which Tune's loggers after it write as well (JSON,
    TensorBoard; `MLflowLoggerCallback` and `WandbLoggerCallback` where they are given):
    `front_size` and `front_hypervolume`, the front's share of the box of all results so far.

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
        # Made when the search begins: none of them can be pickled with it.
        self._console: Console | None = None
        self._live: Live | None = None
        self._cell: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_console": None, "_live": None, "_cell": None}

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
        """Remembers the last report, and adds the front's figures for the loggers that come after."""
        self._last[trial.trial_id] = dict(result)
        # Tune's loggers (JSON, TensorBoard, MLflow, Weights & Biases) get the same dict.
        result["front_size"] = len(self._progress.front())
        result["front_hypervolume"] = self._progress.hypervolume()

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
        elif self._progress.ended and not self._screen.is_jupyter:
            self._print(Text(summary(self._progress, 0)))

    def _end(self, trial: Any, tune_status: str, trials: list[Any]) -> None:
        metrics = self._last.pop(trial.trial_id, {})
        status = self._progress.end(trial.trial_id, metrics, tune_status)
        is_on_front = trial.trial_id in self._progress.front()
        if status in ("completed", "stopped"):
            line = trial_line(self._progress, status, values_text(self._goal, metrics), is_on_front)
            if self._screen.is_terminal:
                line.truncate(self._screen.width, overflow="ellipsis")
        else:
            line = trial_line(self._progress, status, str(metrics.get("reason", "")) or _error_of(trial), False)
        # A notebook keeps to its one view; what goes wrong is told there too.
        if not self._screen.is_jupyter or status in ("failed", "infeasible"):
            self._print(line)
        self._refresh(trials)

    @property
    def _screen(self) -> Console:
        if self._console is None:
            self._console = Console(highlight=False, stderr=self._stderr)
        return self._console

    def _print(self, line: Text) -> None:
        self._screen.print(line, soft_wrap=True)

    def _refresh(self, trials: list[Any]) -> None:
        console = self._screen
        if not console.is_terminal and not console.is_jupyter:
            return
        running = sum(trial.status == "RUNNING" for trial in trials)
        shown = view(self._progress, running, console)
        if console.is_jupyter:
            self._show_in_notebook(shown)
            return
        if self._live is None:
            self._live = Live(console=console, auto_refresh=False, redirect_stderr=False)
            self._live.start()
            atexit.register(self._live.stop)  # An aborted search must not leave the cursor hidden.
        self._live.update(shown, refresh=True)

    def _show_in_notebook(self, shown: Group) -> None:
        from IPython.display import display

        panel = Panel(shown, box=MINIMAL)
        if self._cell is None:
            self._cell = display(panel, display_id=True)
        else:
            self._cell.update(panel)


def _error_of(trial: Any) -> str:
    """The last line of a trial's error, "" if it cannot be read."""
    try:
        lines = Path(trial.error_file).read_text(errors="replace").strip().splitlines()
    except (OSError, TypeError):
        return ""
    return lines[-1] if lines else ""
