"""The documentation's page on the quality of search, from the raw results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "guides" / "searchers.md"
_BEGIN, _END = "<!-- figures: written by benchmarks/search_quality.py --render -->\n", "<!-- end of figures -->\n"
_COLOURS = ("#7a7a7a", "#1f77b4", "#9467bd", "#8c564b", "#d62728", "#2ca02c", "#ff7f0e", "#17becf")
_PLOTTED = (
    "random",
    "optuna-nsga2",
    "optuna-tpe",
    "optuna-gp",
    "bayesian+costs",
    "evolutionary+costs",
    "hybrid+costs",
    "gnn+costs",
)


def render(results: Path) -> None:
    """Puts tables and plots between the page's marks."""
    parts = [_BEGIN, "\n"]
    for path in sorted(results.glob("search_quality_*.json")):
        record = json.loads(path.read_text())
        (DOCS / "assets").mkdir(exist_ok=True)
        plot = DOCS / "assets" / f"{path.stem}.svg"
        plot.write_text(_plot(record))
        parts += [
            f"### {record['problem']}\n\n",
            _table(record),
            f"\n![{record['problem']}](../assets/{plot.name})\n\n",
        ]
    parts += [_constraint_table(results / "search_constraint.json"), _speed_table(results / "search_speed.json"), _END]
    text = PAGE.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    PAGE.write_text(before + "".join(parts) + after)


def _table(record: dict[str, Any]) -> str:
    points = record["checkpoints"]
    lines = [f"| searcher | seeds | {' | '.join(map(str, points))} | accurate box, last | ms a trial |\n"]
    lines.append("| --- | --- |" + " --- |" * (len(points) + 2) + "\n")
    for name, runs in record["runs"].items():
        if not runs:
            continue
        cells = []
        for index in range(len(points)):
            values = [run["front"][index] for run in runs if len(run["front"]) > index]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}" if values else "")
        accurate = np.mean([run["accurate"][-1] for run in runs])
        cost = 1e3 * np.median([run["cpu_seconds_a_trial"] for run in runs])
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {accurate:.3f} | {cost:.1f} |\n")
    return "".join(lines)


def _plot(record: dict[str, Any]) -> str:
    """Mean share of the front's hypervolume over the trials, as SVG."""
    points = record["checkpoints"]
    curves = {}
    for name in _PLOTTED:
        runs = record["runs"].get(name) or []
        length = min((len(run["front"]) for run in runs), default=0)
        if length:
            curves[name] = np.mean([run["front"][:length] for run in runs], axis=0)
    low = 0.05 * np.floor(20 * min((float(curve.min()) for curve in curves.values()), default=0.0))
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 320" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="640" height="320" fill="white"/>')

    def place(trials: float, share: float) -> str:
        return f"{50 + 400 * trials / points[-1]:.1f},{290 - 270 * (share - low) / (1 - low):.1f}"

    for share in np.linspace(low, 1, 6):
        x, y = place(0, share).split(",")
        parts.append(f'<path d="M{x},{y} h400" stroke="#dddddd"/><text x="8" y="{float(y) + 4:.0f}">{share:.2f}</text>')
    for trials in points:
        parts.append(f'<text x="{place(trials, low).split(",")[0]}" y="310" text-anchor="middle">{trials}</text>')
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[_PLOTTED.index(name)]
        line = " ".join(place(trials, share) for trials, share in zip(points, curve, strict=False))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="470" y="{40 + 20 * index}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _constraint_table(path: Path) -> str:
    if not path.exists():
        return ""
    lines = [
        "### Under a constraint that only trials tell\n\n",
        "| problem | searcher | seeds | feasible in 200 trials, each once | on the front |\n",
    ]
    lines.append("| --- | --- | --- | --- | --- |\n")
    for problem, searchers in json.loads(path.read_text()).items():
        for name, runs in searchers.items():
            feasible, front = (np.mean([run[key] for run in runs]) for key in ("feasible", "front"))
            lines.append(f"| {problem} | {name} | {len(runs)} | {feasible:.1f} | {front:.1f} |\n")
    return "".join([*lines, "\n"])


def _speed_table(path: Path) -> str:
    if not path.exists():
        return ""
    lines = ["### What a suggestion costs\n\n30 dimensions, one thread, milliseconds of processor time.\n\n"]
    lines.append("| searcher | median | mean | longest of 23 | a result |\n| --- | --- | --- | --- | --- |\n")
    for name, row in json.loads(path.read_text()).items():
        keys = ("suggest_median_ms", "suggest_mean_ms", "suggest_longest_ms", "complete_median_ms")
        figures = [row[key] for key in keys]
        lines.append(f"| {name} observations | {' | '.join(map(str, figures))} |\n")
    return "".join([*lines, "\n"])
