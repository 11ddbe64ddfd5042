"""A search as it goes: a line for each trial that ends, and the front so far."""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from rich.console import Console

from ray_nascomp.goals import Goal
from ray_nascomp.pareto import front_indices
from ray_nascomp.results.loading import status_of


class FrontReporter(tune.Callback):
    """A Tune callback that prints what each trial came to.

    Give it to `tune.RunConfig(callbacks=[...], verbose=0)`.

    Args:
        goal: Objectives and constraints, whose metrics are shown.
        num_samples: How many trials there will be, for the estimate of the time left.
    """

    def __init__(self, goal: Goal, num_samples: int | None = None) -> None:
        self._goal = goal
        self._num_samples = num_samples
        self._started = 0.0
        self._ended = 0
        self._counts = {"completed": 0, "stopped": 0, "infeasible": 0, "failed": 0}
        self._completed: list[dict[str, Any]] = []
        self._last: dict[str, dict[str, Any]] = {}

    def setup(
        self, stop: Any = None, num_samples: int | None = None, total_num_samples: int | None = None, **info: Any
    ) -> None:
        """The search begins."""
        self._started = time.monotonic()
        self._num_samples = self._num_samples or total_num_samples or num_samples

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Remembers the last report."""
        self._last[trial.trial_id] = dict(result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended by itself or was stopped."""
        self._end(trial, "TERMINATED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed for good, or is about to be tried again."""
        if trial.status == "ERROR":
            self._end(trial, "ERROR")

    def _end(self, trial: Any, tune_status: str) -> None:
        metrics = self._last.pop(trial.trial_id, {})
        status = status_of([metrics] if metrics else [], tune_status, "")
        self._counts[status] = self._counts.get(status, 0) + 1
        self._ended += 1
        mark = ""
        if status == "completed":
            self._completed.append(metrics)
            if len(self._completed) - 1 in front_indices(self._goal, self._completed):
                mark = "  [bold green]on the front[/]"
        total = f"/{self._num_samples}" if self._num_samples else ""
        values = [
            f"{name} {metrics[name]:.4g}" for name in self._goal.metrics if isinstance(metrics.get(name), (int, float))
        ]
        what = "  ".join(values) if status in ("completed", "stopped") else str(metrics.get("reason", ""))
        # A console of its own, since callbacks are pickled with the search.
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"[dim]{self._ended:>4}{total} {self._time():>12}[/]  {status:<10}  {what}{mark}")

    def _time(self) -> str:
        elapsed = time.monotonic() - self._started
        if not self._num_samples or self._ended < 4:
            return f"{elapsed:.0f}s"
        left = elapsed / self._ended * max(0, self._num_samples - self._ended)
        return f"{elapsed:.0f}s +{left:.0f}s"
