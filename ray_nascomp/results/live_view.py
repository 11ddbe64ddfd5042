"""What a terminal or a notebook shows of a running search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ray_nascomp.goals import Goal, as_float
from ray_nascomp.results.progress import Progress, duration

_ROWS = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
_NARROW = 100


def trial_line(progress: Progress, status: str, what: str, is_on_front: bool) -> Text:
    """One line for a trial that has ended: how many there are, the clock, what became of it."""
    total = f"/{progress.total}" if progress.total else ""
    left = progress.left
    clock = duration(progress.elapsed) + ("" if left is None else f" +{duration(left)}")
    line = Text.assemble((f"{progress.ended:>4}{total} {clock:>14}", "dim"), f"  {status:<10}  ")
    if is_on_front:
        line.append("front  ", style="bold green")
    return line.append(what)


def values_text(goal: Goal, metrics: Mapping[str, Any]) -> str:
    """The goal's metrics of a report in one line."""
    values = {name: as_float(metrics.get(name)) for name in goal.metrics}
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if math.isfinite(value))


def summary(progress: Progress, running: int) -> str:
    """Counts, time and hypervolume in one line."""
    counts: list[tuple[str, int]] = [("running", running), *progress.counts.items()]
    states = ", ".join(f"{count} {status}" for status, count in counts if count) or "none"
    left = progress.left
    time_left = "" if left is None or not running else f", about {duration(left)} left"
    total = f" of {progress.total}" if progress.total else ""
    return (
        f"{progress.ended}{total} trials in {duration(progress.elapsed)}{time_left}: {states}; "
        f"{len(progress.front())} on the front, hypervolume {progress.hypervolume():.3f}"
    )


def view(progress: Progress, running: int, console: Console) -> Group:
    """The block below the lines: summary, hypervolume so far, front.

    Columns that do not fit into a narrow terminal are left out, constraints first.
    """
    head = Text(summary(progress, running), overflow="fold")
    curve = progress.curve()
    can_draw = console.encoding.lower().startswith("utf")
    parts: list[Text | Table] = [head]
    if len(curve) > 1 and can_draw:
        parts.append(Text.assemble("hypervolume so far  ", (sparkline(curve), "cyan")))
    front = progress.front()
    if front:
        parts.append(_table(progress.goal, list(front.items()), "front", console.width))
    elif progress.nearest() is not None:
        parts.append(Text("No trial fulfils the constraints yet; the nearest:", style="yellow"))
        parts.append(_table(progress.goal, [progress.nearest()], "trial", console.width))  # type: ignore[list-item]
    return Group(*parts)


def sparkline(values: Sequence[float]) -> str:
    """Values from 0 to 1 as blocks of eight heights."""
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, int(value * len(_BLOCKS)))] for value in values)


def _table(goal: Goal, rows: Sequence[tuple[str, Mapping[str, Any]]], title: str, width: int) -> Table:
    names = list(goal.metrics)
    if width < _NARROW:
        objectives = [objective.metric for objective in goal.objectives]
        room = (width - 16) // 12
        names = [name for name in names if name in objectives or names.index(name) < room]
    table = Table(box=None, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", overflow="ellipsis", no_wrap=True)
    for trial_id, metrics in rows[:_ROWS]:
        table.add_row(Text(trial_id), *(f"{as_float(metrics.get(name)):.4g}" for name in names))
    if len(rows) > _ROWS:
        table.add_row(f"and {len(rows) - _ROWS} more")
    return table
