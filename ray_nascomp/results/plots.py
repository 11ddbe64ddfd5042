"""Plotly figures of a search's results, in colours that colour-blind people tell apart.

Only scatters and bars, so that the report gets by with Plotly's smallest bundle.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ray_nascomp.results.loading import TrialRecord

if TYPE_CHECKING:
    from ray_nascomp.results.results import Results

# Okabe and Ito's palette.
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#9A9A9A", "#009E73"
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "system-ui, sans-serif", "size": 14},
    "margin": {"l": 60, "r": 20, "t": 64, "b": 55},
    "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom"},
}
_DECADES = 50
_COSTS = (("params", "parameters"), ("macs", "multiply-accumulates"), ("bytes", "bytes"))


def front_figure(results: Results) -> go.Figure:
    """All completed trials: the first objective over each of the others; the front stands out.

    With one objective, it is drawn against the order of the trials.
    """
    first, *others = [objective.metric for objective in results.goal.objectives]
    order = {trial.trial_id: number for number, trial in enumerate(results.trials)}
    panels = max(1, len(others))
    figure = make_subplots(rows=panels, cols=1, vertical_spacing=0.25 / panels)
    markers = {
        "infeasible": {"color": GREY, "symbol": "x-thin-open", "size": 8},
        "dominated": {"color": BLUE, "symbol": "circle-open", "size": 8},
        "front": {"color": ORANGE, "symbol": "diamond", "size": 12},
    }
    classes = _classes(results)
    for panel in range(panels):
        for name, trials in classes.items():
            figure.add_scatter(
                x=[t.metrics.get(others[panel]) if others else order[t.trial_id] for t in trials],
                y=[t.metrics.get(first) for t in trials],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=panel == 0,
                marker=markers[name],
                customdata=[t.trial_id for t in trials],
                # A plan that is not on the front is told once, which keeps reports of long searches small.
                hovertext=[_hover(t, results, has_plan=panel == 0 or name == "front") for t in trials],
                hoverinfo="text",
                row=panel + 1,
                col=1,
            )
        title = _axis(results, panel + 1) if others else "trial"
        figure.update_xaxes(title_text=title, row=panel + 1, col=1)
        figure.update_yaxes(title_text=_axis(results, 0), row=panel + 1, col=1)
    figure.update_layout(**_LAYOUT, hoverlabel={"align": "left", "font": {"size": 12}}, height=80 + 360 * panels)
    return figure


def history_figure(results: Results, against: str = "trial") -> go.Figure:
    """Hypervolume against the number of completed trials, or against seconds.

    Args:
        results: The results.
        against: "trial" or "seconds".
    """
    history = results.history()
    figure = go.Figure()
    figure.add_scatter(
        x=history[against],
        y=history["hypervolume"],
        mode="lines",
        line={"color": BLUE, "shape": "hv"},
        name="hypervolume",
    )
    title = "completed trials" if against == "trial" else "seconds since the start"
    layout = {**_LAYOUT, "margin": {**_LAYOUT["margin"], "t": 20}}
    figure.update_layout(**layout, xaxis_title=title, yaxis_title="hypervolume", yaxis_range=[0, 1.02], height=340)
    return figure


def parallel_figure(results: Results) -> go.Figure:
    """Every searched dimension and every objective of the completed trials as parallel axes.

    A line is a trial. Each axis runs from its smallest value to its largest.
    """
    from ray_nascomp.results.results import flat

    classes = _classes(results)
    configs = {trial.trial_id: flat(trial.config) for trials in classes.values() for trial in trials}
    columns: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(name for config in configs.values() for name in config):
        column = {trial_id: config.get(key) for trial_id, config in configs.items()}
        if len(set(map(str, column.values()))) > 1:
            columns[key if _short(key) in columns else _short(key)] = column
    for objective in results.goal.objectives:
        columns[objective.metric] = {
            t.trial_id: t.metrics.get(objective.metric) for trials in classes.values() for t in trials
        }
    axes = {label: _Axis(column) for label, column in columns.items()}
    lines = {
        "infeasible": {"color": GREY, "width": 0.6, "dash": "dot"},
        "dominated": {"color": "rgba(0, 114, 178, 0.4)", "width": 0.6},
        "front": {"color": ORANGE, "width": 2},
    }
    figure = go.Figure()
    for name, trials in classes.items():
        places: list[int | None] = []
        heights: list[float | None] = []
        ids: list[str | None] = []
        texts: list[str | None] = []
        for trial in trials:
            # None ends a line, so that one trace holds the lines of all its trials.
            places += [*range(len(axes)), None]
            heights += [*(axis.height(trial.trial_id) for axis in axes.values()), None]
            ids += [*[trial.trial_id] * len(axes), None]
            values = (f"{label}: {_brief(column[trial.trial_id])}" for label, column in columns.items())
            texts += [*(html.escape(text) for text in values), None]
        figure.add_scatter(
            x=places,
            y=heights,
            mode="lines",
            name=name,
            line=lines[name],
            customdata=ids,
            text=texts,
            hovertemplate="trial %{customdata}<br>%{text}<extra></extra>",
        )
    for place, axis in enumerate(axes.values()):
        figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, line={"color": "#444444", "width": 1})
        for height, text in axis.ticks():
            figure.add_annotation(
                x=place,
                y=height,
                text=html.escape(text),
                showarrow=False,
                font={"size": 11},
                bgcolor="rgba(255, 255, 255, 0.75)",
                yshift=10 if height == 1 else -10 if height == 0 else 0,
            )
    labels = [html.escape(label) for label in axes]
    figure.update_xaxes(
        tickvals=list(range(len(axes))),
        ticktext=labels,
        tickangle=-35,
        side="top",
        showgrid=False,
        zeroline=False,
        range=[-0.5, len(axes) - 0.5],
    )
    figure.update_yaxes(visible=False, range=[-0.08, 1.08])
    legend = {"orientation": "h", "y": -0.02, "yanchor": "top"}
    layout = {**_LAYOUT, "margin": {"l": 40, "r": 40, "t": 150, "b": 50}, "legend": legend, "hovermode": "closest"}
    figure.update_layout(**layout, height=540, dragmode="select")
    return figure


class _Axis:
    """One of the parallel axes: numbers to scale, logarithmic over decades; anything else at even distances.

    Args:
        column: Trial id -> value.
    """

    def __init__(self, column: Mapping[str, Any]) -> None:
        values = [v for v in column.values() if _is_there(v)]
        self._is_numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        self._labels = [] if self._is_numeric else sorted(set(map(str, values)))
        numbers: list[float] = list(values) if self._is_numeric else list(range(len(self._labels)))
        self._low, self._high = min(numbers, default=0.0), max(numbers, default=0.0)
        self._is_logarithmic = self._low > 0 and self._high > _DECADES * self._low
        self._column = column

    def height(self, trial_id: str) -> float | None:
        value = self._column[trial_id]
        if not _is_there(value):
            return None
        return self._scaled(value if self._is_numeric else self._labels.index(str(value)))

    def ticks(self) -> list[tuple[float, str]]:
        """Pairs (height, text) to write beside the axis."""
        if self._is_numeric:
            return [(self._scaled(value), f"{value:.3g}") for value in dict.fromkeys((self._low, self._high))]
        return [(self._scaled(number), label) for number, label in enumerate(self._labels)]

    def _scaled(self, number: float) -> float:
        low, high = self._low, self._high
        if self._is_logarithmic:
            low, high, number = math.log(low), math.log(high), math.log(number)
        return round((number - low) / (high - low), 4) if high > low else 0.5


def layers_figure(layers: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Parameters, multiply-accumulates and bytes of each layer before and after compression, as bars.

    Args:
        layers: Rows of a manifest's layer table.
    """
    weighty = [row for row in layers if row["macs_before"] or row["macs_after"]]
    names = [row["name"] for row in weighty]
    figure = make_subplots(rows=len(_COSTS), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for panel, (key, title) in enumerate(_COSTS, start=1):
        for when, colour in (("before", GREY), ("after", GREEN)):
            figure.add_bar(
                x=names,
                y=[row[f"{key}_{when}"] for row in weighty],
                name=when,
                legendgroup=when,
                showlegend=panel == 1,
                marker_color=colour,
                row=panel,
                col=1,
            )
        figure.update_yaxes(title_text=title, type="log", row=panel, col=1)
    figure.update_layout(**_LAYOUT, barmode="group", height=80 + 220 * len(_COSTS))
    return figure


def importance_figure(results: Results) -> go.Figure:
    """Share of each dimension in what changes each objective, as bars; the most important on top.

    Raises:
        ConfigError: If scikit-learn is not installed, or too few trials have been completed.
    """
    table = results.importance()[::-1]
    figure = go.Figure()
    for metric, colour in zip(table.columns, itertools.cycle((BLUE, ORANGE, GREEN, GREY)), strict=False):
        figure.add_bar(x=table[metric], y=list(table.index), name=metric, marker_color=colour, orientation="h")
    layout = {**_LAYOUT, "margin": {**_LAYOUT["margin"], "l": 220}}
    figure.update_layout(
        **layout, xaxis={"title": {"text": "share"}, "tickformat": ".0%"}, height=140 + 40 * len(table)
    )
    return figure


def _classes(results: Results) -> dict[str, list[TrialRecord]]:
    """The completed trials by what they are worth, the best last, so that it is drawn on top."""
    front = results.front()
    on_front = {trial.trial_id for trial in front}
    rest = [t for t in results.trials if t.status == "completed" and t.trial_id not in on_front]
    return {
        "infeasible": [t for t in rest if not results.goal.is_feasible(t.metrics)],
        "dominated": [t for t in rest if results.goal.is_feasible(t.metrics)],
        "front": front,
    }


def _is_there(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _hover(trial: TrialRecord, results: Results, has_plan: bool) -> str:
    from ray_nascomp.results.results import flat

    metrics = {name: trial.metrics[name] for name in results.goal.metrics if name in trial.metrics}
    plan = flat(trial.config) if has_plan else {}
    lines = [f"{name}: {_brief(value)}" for name, value in (("trial", trial.trial_id), *metrics.items(), *plan.items())]
    return "<br>".join(html.escape(line) for line in lines)


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _axis(results: Results, index: int) -> str:
    objective = results.goal.objectives[index]
    better = "more" if objective.mode == "max" else "less"
    return f"{objective.metric} ({better} is better)"


def _short(key: str) -> str:
    return "/".join(key.split("/")[-2:])
