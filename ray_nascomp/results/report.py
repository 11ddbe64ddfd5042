"""The report: one HTML file that works offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ray_nascomp.results.results import Results

_TEMPLATE = "report.html.j2"
_SHOWN = ("speedup", "size_ratio", "size_mb", "params", "macs", "latency_ms")
_AXIS_WIDTH = 64
_IMPORTANT = 12
_PLOT_CONFIG = {"displaylogo": False, "responsive": True}


def write_report(results: Results, path: Path) -> Path:
    """Writes the report; returns its path."""
    import jinja2
    import plotly.offline

    from ray_nascomp.results.plots import history_figure

    parallel = results.plot_parallel()
    environment = jinja2.Environment(loader=jinja2.PackageLoader("ray_nascomp", "results"), autoescape=True)
    page = environment.get_template(_TEMPLATE).render(
        name=Path(results.path).name,
        goal=results.goal,
        counts=_counts(results),
        hypervolume=results.hypervolume(),
        front=_front_table(results),
        chosen=_chosen(results),
        figures={
            "front": _as_html(results.plot_front(), "front"),
            "history": _as_html(results.plot_history(), "history"),
            "time": _as_html(history_figure(results, "seconds"), "time"),
            "parallel": _as_html(parallel, "parallel"),
        },
        parallel_width=f"{_AXIS_WIDTH * (1 + len(parallel.data[0].dimensions))}px",
        importance=_importance(results),
        seconds=_stage_seconds(results),
        failures=_failures(results),
        plotly=plotly.offline.get_plotlyjs(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _as_html(figure: go.Figure, name: str) -> str:
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{name}",
        config=_PLOT_CONFIG,
        default_height=figure.layout.height or 420,
    )


def _counts(results: Results) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trial in results.trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    return counts


def _front_table(results: Results) -> dict[str, Any]:
    front = results.front()
    reported = set().union(*(trial.metrics for trial in front)) if front else set()
    columns = list(results.goal.metrics) + [n for n in _SHOWN if n in reported and n not in results.goal.metrics]
    rows = [
        {
            "trial_id": trial.trial_id,
            "values": [trial.metrics.get(column) for column in columns],
            "plan": json.dumps(trial.config, indent=1, default=str),
        }
        for trial in front
    ]
    return {"columns": columns, "rows": rows}


def _chosen(results: Results) -> dict[str, Any] | None:
    """The knee of the front with its layers, where its files are there."""
    from ray_nascomp.results.plots import layers_figure

    try:
        best = results.best()
    except ConfigError:
        return None
    layers: list[dict[str, Any]] = []
    if best.folder is not None:
        try:
            with best.filesystem.open_input_stream(f"{best.folder}/manifest.json") as stream:
                layers = json.loads(stream.read()).get("layers", [])
        except (OSError, ValueError, AttributeError):
            layers = []
    return {
        "trial_id": best.trial_id,
        "plan": json.dumps(best.config, indent=1, default=str),
        "layers": layers,
        "figure": _as_html(layers_figure(layers), "layers") if layers else "",
    }


def _importance(results: Results) -> dict[str, Any] | None:
    """Shares of the dimensions that matter most, where they can be computed."""
    try:
        table = results.importance().head(_IMPORTANT)
    except ConfigError:
        return None
    rows = [{"name": str(name), "shares": list(shares)} for name, shares in zip(table.index, table.values, strict=True)]
    return {"columns": list(table.columns), "rows": rows}


def _stage_seconds(results: Results) -> list[tuple[str, float]]:
    """Seconds that all trials together spent in each stage."""
    totals: dict[str, float] = {}
    for trial in results.trials:
        for name, value in trial.metrics.items():
            if name.startswith("seconds_") and isinstance(value, (int, float)):
                totals[name.removeprefix("seconds_")] = totals.get(name.removeprefix("seconds_"), 0.0) + value
    return sorted(totals.items(), key=lambda item: -item[1])


def _failures(results: Results) -> list[dict[str, str]]:
    rows = []
    for trial in results.trials:
        if trial.status in ("failed", "infeasible"):
            reason = str(trial.metrics.get("reason") or trial.error or "no report")
            last = reason.strip().splitlines()[-1] if reason.strip() else ""
            rows.append({"trial_id": trial.trial_id, "status": trial.status, "reason": last, "detail": reason})
    return rows
