"""The report: one HTML file that works offline."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ray_nascomp.errors import ConfigError
from ray_nascomp.results.loading import TrialStatus

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ray_nascomp.results.results import Results

_TEMPLATE = "report.html.j2"
_SHOWN = ("speedup", "size_ratio", "size_mb", "params", "macs", "latency_ms")
_AXIS_WIDTH = 64
_IMPORTANT = 12
_MOST_WITH_LAYERS = 60
_FEW_LAYERS = 16
_HEIGHT = 420


def write_report(results: Results, path: Path) -> Path:
    """Writes the report; returns its path."""
    import jinja2

    from ray_nascomp.results.plots import history_figure

    parallel = results.plot_parallel()
    figures = {
        "front": results.plot_front(),
        "history": results.plot_history(),
        "time": history_figure(results, "seconds"),
        "parallel": parallel,
    }
    assets = files("ray_nascomp.results") / "assets"
    environment = jinja2.Environment(loader=jinja2.PackageLoader("ray_nascomp", "results"), autoescape=True)
    page = environment.get_template(_TEMPLATE).render(
        name=Path(results.path).name,
        goal=results.goal,
        counts=_counts(results),
        hypervolume=results.hypervolume(),
        front=_front_table(results),
        data=_data(results),
        figures={name: _figure(figure) for name, figure in figures.items()},
        parallel_width=f"{_AXIS_WIDTH * (1 + len(parallel.layout.xaxis.tickvals))}px",
        importance=_importance(results),
        seconds=_stage_seconds(results),
        cache_share=_cache_share(results),
        failures=_failures(results),
        css=(assets / "report.css").read_text(encoding="utf-8"),
        script=(assets / "report.js").read_text(encoding="utf-8"),
        plotly=(assets / "plotly-basic.min.js").read_text(encoding="utf-8"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _figure(figure: go.Figure) -> dict[str, Any]:
    """The figure's JSON, in which no text can end the script element that holds it."""
    return {"json": figure.to_json().replace("<", "\\u003c"), "height": figure.layout.height or _HEIGHT}


def _counts(results: Results) -> dict[str, int]:
    """Status -> number of trials, the good ones first."""
    statuses = [trial.status for trial in results.trials]
    return {status: statuses.count(status) for status in get_args(TrialStatus) if status in statuses}


def _columns(results: Results) -> list[str]:
    """Metrics to show: the goal's, then what else people ask for, where it was reported."""
    front = results.front()
    reported = set().union(*(trial.metrics for trial in front)) if front else set()
    return list(results.goal.metrics) + [n for n in _SHOWN if n in reported and n not in results.goal.metrics]


def _front_table(results: Results) -> dict[str, Any]:
    columns = _columns(results)
    rows = [
        {"trial_id": trial.trial_id, "values": [trial.metrics.get(column) for column in columns]}
        for trial in results.front()
    ]
    return {"columns": columns, "rows": rows}


def _data(results: Results) -> dict[str, Any]:
    """What the page's script shows of a trial: metrics and plan of each, layers of those on the front."""
    from ray_nascomp.results.results import flat

    completed = [trial for trial in results.trials if trial.status == "completed"]
    configs = {trial.trial_id: flat(trial.config) for trial in completed}
    dimensions = list(dict.fromkeys(name for config in configs.values() for name in config))
    columns = _columns(results)
    try:
        knee = results.best().trial_id
    except ConfigError:
        knee = None
    front = results.front()
    wanted = {trial.trial_id for trial in front[:_MOST_WITH_LAYERS]} | {knee}
    layers = {t.trial_id: rows for t in front if t.trial_id in wanted and (rows := results.layers(t))}
    return {
        "knee": knee,
        "metrics": columns,
        "dimensions": dimensions,
        "trials": {
            trial.trial_id: {
                "metrics": [_plain(trial.metrics.get(column)) for column in columns],
                "plan": [_plain(configs[trial.trial_id].get(name)) for name in dimensions],
            }
            for trial in completed
        },
        "layers": layers,
        "few_layers": all(len(rows) <= _FEW_LAYERS for rows in layers.values()),
    }


def _plain(value: Any) -> str | float | int | bool | None:
    """A value as JSON has it; NaN and the like are not there."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _importance(results: Results) -> dict[str, Any]:
    """Shares of the dimensions that matter most, or the reason why they are not known."""
    try:
        table = results.importance().head(_IMPORTANT)
    except ConfigError as error:
        return {"columns": [], "rows": [], "reason": str(error).removeprefix("importance: ")}
    rows = [{"name": str(name), "shares": list(shares)} for name, shares in zip(table.index, table.values, strict=True)]
    return {"columns": list(table.columns), "rows": rows, "reason": ""}


def _stage_seconds(results: Results) -> list[tuple[str, float, float]]:
    """Seconds that all trials together spent in each stage, and their share, the longest first."""
    totals: dict[str, float] = {}
    for trial in results.trials:
        for name, value in trial.metrics.items():
            if name.startswith("seconds_") and isinstance(value, (int, float)):
                totals[name.removeprefix("seconds_")] = totals.get(name.removeprefix("seconds_"), 0.0) + value
    whole = sum(totals.values()) or 1.0
    return [(name, value, value / whole) for name, value in sorted(totals.items(), key=lambda item: -item[1])]


def _cache_share(results: Results) -> float | None:
    """Share of the stages that trials took from the stage cache; None where there was none."""
    hits, misses = (
        sum(trial.metrics.get(f"cache_{name}", 0) for trial in results.trials) for name in ("hits", "misses")
    )
    return hits / (hits + misses) if hits + misses else None


def _failures(results: Results) -> list[dict[str, Any]]:
    """Trials that failed or were infeasible, those with the same reason together, the most frequent first."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for trial in results.trials:
        if trial.status in ("failed", "infeasible"):
            detail = str(trial.metrics.get("reason") or trial.error or "no report")
            last = detail.strip().splitlines()[-1] if detail.strip() else ""
            row = {"status": trial.status, "reason": last, "detail": detail, "trials": []}
            rows.setdefault((trial.status, last), row)["trials"].append(trial.trial_id)
    return sorted(rows.values(), key=lambda row: -len(row["trials"]))
