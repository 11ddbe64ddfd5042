"""How a running search stands: counts, front, hypervolume, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, track
from rich.progress import Progress as Bar
from rich.text import Text

from ray_nascomp.goals import Goal
from ray_nascomp.pareto import front_indices, normalised_hypervolume
from ray_nascomp.results.loading import TrialStatus, status_of

if TYPE_CHECKING:
    from ray_nascomp.pipeline import Step
    from ray_nascomp.pipeline.training import OnProgress

_Item = TypeVar("_Item")
_FEWEST_FOR_ESTIMATE = 4
_TRAINING = "training the chosen model"


class Progress:
    """What has become of the trials so far.

    Args:
        goal: Objectives and constraints.

    Attributes:
        goal: Objectives and constraints.
        total: How many trials there will be, None if unknown.
        counts: Status -> number of trials that have ended so.
    """

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        self.total: int | None = None
        self.counts: dict[TrialStatus, int] = {"completed": 0, "stopped": 0, "infeasible": 0, "failed": 0}
        self._started = time.monotonic()
        self._completed: dict[str, Mapping[str, Any]] = {}

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return sum(self.counts.values())

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float | None:
        """Estimated seconds until the last trial ends, None while too little is known."""
        if self.total is None or self.ended < _FEWEST_FOR_ESTIMATE:
            return None
        return self.elapsed / self.ended * max(0, self.total - self.ended)

    def end(self, trial_id: str, metrics: Mapping[str, Any], tune_status: str) -> TrialStatus:
        """Notes that a trial has ended, and how.

        Args:
            trial_id: Tune's id.
            metrics: Its last report, empty if there was none.
            tune_status: Tune's own status.
        """
        status = status_of([metrics] if metrics else [], tune_status, "")
        self.counts[status] = self.counts.get(status, 0) + 1
        if status == "completed":
            self._completed[trial_id] = metrics
        return status

    def front(self) -> dict[str, Mapping[str, Any]]:
        """Trial id -> metrics of the front so far, by the first objective, best first."""
        rows = list(self._completed.items())
        front = [rows[i] for i in front_indices(self.goal, [metrics for _, metrics in rows])]
        return dict(sorted(front, key=lambda row: self.goal.losses(row[1])[0]))

    def nearest(self) -> tuple[str, Mapping[str, Any]] | None:
        """The completed trial that violates the constraints least, None while there is none."""
        rows = list(self._completed.items())
        return min(rows, key=lambda row: self.goal.violation(row[1])) if rows else None

    def hypervolume(self) -> float:
        """Share of the box from the best to the worst completed feasible result that the front dominates."""
        losses = self._losses()
        return self._share(losses, losses) if len(losses) else 0.0

    def curve(self, points: int = 24) -> list[float]:
        """Hypervolume after the feasible results one by one, in today's box, at most so many values."""
        losses = self._losses()
        ends = sorted({round(end) for end in np.linspace(1, len(losses), min(points, len(losses)))})
        return [self._share(losses[:end], losses) for end in ends]

    def _losses(self) -> np.ndarray:
        rows = [self.goal.losses(m) for m in self._completed.values() if self.goal.is_feasible(m)]
        return np.array(rows, dtype=float).reshape(len(rows), len(self.goal.objectives))

    def _share(self, losses: np.ndarray, box: np.ndarray) -> float:
        return normalised_hypervolume(losses, box.min(axis=0), box.max(axis=0))


def duration(seconds: float) -> str:
    """Seconds for people: "42s", "3m07s", "2h05m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def counted(items: Sequence[_Item], what: str, shown: bool) -> Iterator[_Item]:
    """The items, with a bar on stderr that shows how many are done; a line where that is no terminal.

    Args:
        items: The items.
        what: What is done with them.
        shown: Whether anything is shown.
    """
    console = Console(stderr=True, highlight=False)
    has_bar = console.is_terminal and not console.is_jupyter
    if shown and not has_bar:
        console.print(f"{what}: {len(items)}")
    yield from track(items, what, console=console, disable=not (shown and has_bar))


def tracked(start: Callable[[OnProgress], Iterable[Step]], count: int, metric: str) -> Iterator[Step]:
    """Steps of a run, while a bar shows how far teacher, pruning and training are, and how good the model is.

    The bar is on stderr. Where that is no terminal, a line is written for each step, and one a minute in between; in a
    notebook it is a line in the cell's output.

    Args:
        start: Function (what is to be called with all progress) -> the steps.
        count: How many steps there will be.
        metric: The metric to show.
    """
    with _display(count - 1) as show:
        for number, step in enumerate(start(lambda doing, done: show(*_told(doing, done, count - 1)))):
            quality = f"{metric} {step.metrics[metric]:.4g}"
            show(number, f"epoch {number}/{count - 1}", quality)
            yield step


def _told(doing: str, done: float, epochs: int) -> tuple[float, str]:
    if doing == "teacher":
        return 0.0, f"the teacher has read {done:.0%} of the samples"
    if doing == "pruning":
        return 0.0, f"{done:.0%} of the pruning"
    return done, f"epoch {done:.2f}/{epochs}"


@contextmanager
def _display(epochs: int) -> Iterator[Callable[..., None]]:
    """A function (epochs done, that in words, quality if it is new) that shows it, in whatever way suits the place."""
    console = Console(stderr=True, highlight=False)
    if console.is_jupyter:
        yield _lines(_notebook_cell(), every=1.0)
    elif not console.is_terminal:
        yield _lines(lambda line: console.print(line, soft_wrap=True), every=60.0)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[words]}  {task.fields[quality]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Bar(*columns, console=console) as bar:
            shown, known = bar.add_task(_TRAINING, total=epochs, words="", quality=""), ""

            def show(done: float, words: str, quality: str = "") -> None:
                nonlocal known
                known = quality or known
                bar.update(shown, completed=done, words=words, quality=known)

            yield show


def _lines(write: Callable[[Text], None], every: float) -> Callable[..., None]:
    """Writes a line for each step, and after so many seconds in between."""
    known, written = "", time.monotonic()

    def show(done: float, words: str, quality: str = "") -> None:
        nonlocal known, written
        if not quality and time.monotonic() - written < every:
            return
        known, written = quality or known, time.monotonic()
        write(Text(f"{_TRAINING}: {words}  {known}"))

    return show


def _notebook_cell() -> Callable[[Text], None]:
    from IPython.display import display

    cell: Any = None

    def write(line: Text) -> None:
        nonlocal cell
        if cell is None:
            cell = display(line, display_id=True)
        else:
            cell.update(line)

    return write
