"""Plotly figures of a search's results, in colours that colour-blind people tell apart."""

from __future__ import annotations

import html
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


def front_figure(results: Results) -> go.Figure:
    """All completed trials: the first objective over each of the others; the front stands out.

    With one objective, it is drawn against the order of the trials.
    """
    first, *others = [objective.metric for objective in results.goal.objectives]
    front = results.front()
    on_front = {trial.trial_id for trial in front}
    rest = [t for t in results.trials if t.status == "completed" and t.trial_id not in on_front]
    feasible = [t for t in rest if results.goal.is_feasible(t.metrics)]
    infeasible = [t for t in rest if not results.goal.is_feasible(t.metrics)]
    order = {trial.trial_id: number for number, trial in enumerate(results.trials)}
    panels = max(1, len(others))
    figure = make_subplots(rows=panels, cols=1, vertical_spacing=0.25 / panels)
    for panel in range(panels):
        for name, trials, marker in (
            ("infeasible", infeasible, {"color": GREY, "symbol": "x-thin-open", "size": 8}),
            ("dominated", feasible, {"color": BLUE, "symbol": "circle-open", "size": 8}),
            ("front", front, {"color": ORANGE, "symbol": "diamond", "size": 12}),
        ):
            figure.add_scatter(
                x=[t.metrics.get(others[panel]) if others else order[t.trial_id] for t in trials],
                y=[t.metrics.get(first) for t in trials],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=panel == 0,
                marker=marker,
                customdata=[t.trial_id for t in trials],
                # A plan that is not on the front is told once, which keeps reports of long searches small.
                hovertext=[_hover(t, results, has_plan=panel == 0 or trials is front) for t in trials],
                hoverinfo="text",
                row=panel + 1,
                col=1,
            )
        title = _axis(results, panel + 1) if others else "trial"
        figure.update_xaxes(title_text=title, row=panel + 1, col=1)
        figure.update_yaxes(title_text=_axis(results, 0), row=panel + 1, col=1)
    figure.update_layout(**_LAYOUT, hoverlabel={"align": "left"}, height=80 + 360 * panels)
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
    figure.update_layout(**_LAYOUT, xaxis_title=title, yaxis_title="hypervolume", yaxis_range=[0, 1.02])
    return figure


def parallel_figure(results: Results) -> go.Figure:
    """Every searched dimension and every objective of the completed trials as parallel axes."""
    from ray_nascomp.results.results import flat

    completed = [trial for trial in results.trials if trial.status == "completed"]
    configs = [flat(trial.config) for trial in completed]
    axes = []
    for key in dict.fromkeys(name for config in configs for name in config):
        values = [config.get(key) for config in configs]
        if len(set(map(str, values))) < 2:
            continue
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            axes.append({"label": _short(key), "values": values})
        else:
            labels = sorted(set(map(str, values)))
            numbers = [labels.index(str(value)) for value in values]
            ticks: dict[str, Any] = {"tickvals": list(range(len(labels))), "ticktext": labels}
            axes.append({"label": _short(key), "values": numbers, **ticks})
    for objective in results.goal.objectives:
        axes.append({"label": objective.metric, "values": [t.metrics.get(objective.metric) for t in completed]})
    colours = [trial.metrics.get(results.goal.objectives[0].metric) for trial in completed]
    figure = go.Figure(go.Parcoords(line={"color": colours, "colorscale": "Cividis"}, dimensions=axes, labelangle=-35))
    # Room for the names, which stand aslant over their axes.
    figure.update_layout(**{**_LAYOUT, "margin": {"l": 80, "r": 80, "t": 150, "b": 30}}, height=520)
    return figure


def layers_figure(layers: list[dict[str, Any]]) -> go.Figure:
    """Parameters of each layer before and after compression, as bars.

    Args:
        layers: Rows of a manifest's layer table.
    """
    weighty = [row for row in layers if row["macs_before"] or row["macs_after"]]
    names = [row["name"] for row in weighty]
    figure = go.Figure()
    for title, key, colour in (("before", "bytes_before", GREY), ("after", "bytes_after", GREEN)):
        figure.add_bar(x=names, y=[row[key] for row in weighty], name=title, marker_color=colour)
    figure.update_layout(**_LAYOUT, barmode="group", yaxis_title="bytes (log scale)", yaxis_type="log")
    return figure


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
