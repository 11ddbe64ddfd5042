"""The tables of case studies, from the raw results: `python tables.py RESULT.json... --into README.md docs/cases.md`.

A text gets what it has marks for: the summary, the mean of all seeds; each seed's figures; what is lost and won of
all seeds' samples; the searches' hypervolumes.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

SUMMARY = "<!-- summary of cases: made by make case-tables -->"
ALL = "<!-- cases: made by make case-tables -->"
PAIRED = "<!-- paired samples of cases: made by make case-tables -->"
SEARCHES = "<!-- searches of cases: made by make case-tables -->"
END = "<!-- end of cases -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files result.json and searches.json")
    parser.add_argument(
        "--earlier",
        type=Path,
        nargs="+",
        default=[],
        help="the same of recipes of before; they stand apart, and not in the summary",
    )
    parser.add_argument("--into", type=Path, nargs="+", required=True, help="texts that get a table between its marks")
    arguments = parser.parse_args()
    records = [json.loads(path.read_text()) for path in arguments.results]
    earlier = [json.loads(path.read_text()) for path in arguments.earlier]
    every = [*records, *({**record, "case": f"{record['case']}, earlier recipes"} for record in earlier)]
    every.sort(key=lambda record: (record["case"], record["seed"]))
    tables = {
        SUMMARY: summary(_studies(records)),
        ALL: render(_studies(every)),
        PAIRED: paired(_studies(every)),
        SEARCHES: searches(every),
    }
    for target in arguments.into:
        text = target.read_text()
        if END not in text or not any(begin in text for begin in tables):
            parser.error(f"--into: {target} lacks the line {END}, and one of these before it: {', '.join(tables)}")
        for begin, table in tables.items():
            pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
            text = pattern.sub(f"{begin}\n\n{table}\n\n{END}", text)
        target.write_text(text)


def _studies(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "models" in record]


def summary(records: list[dict[str, Any]]) -> str:
    """Means over the seeds of each case as a table in Markdown; of what is lost also the least and the most.

    Args:
        records: What `run.py` has written, one of each case and seed.
    """
    lines = [
        "| case | model | seeds | test accuracy | points lost | fewer parameters | fewer bytes | faster at batch 1 |",
        "| --- " * 8 + "|",
    ]
    for (case, model), found in _by_model(records).items():
        table = pd.DataFrame([figures for _, figures in found])
        mean, points = table.mean(numeric_only=True), 100 * table["drop"]
        before = mean["accuracy"] + mean["drop"]
        spread = f" ({points.min():.2f} to {points.max():.2f})" if len(found) > 1 else ""
        lines.append(
            f"| {case} | {model} | {len(found)} | {before:.2%}, then {mean['accuracy']:.2%} "
            f"| {points.mean():.2f}{spread} | {1 - mean['params_share']:.1%} | {1 - mean['bytes_share']:.1%} "
            f"| {mean['speedup_batch1_threads1']:.1f}x |"
        )
    return "\n".join(lines)


def _by_model(records: list[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """(case, model) -> the studies that have the model, each with the model's figures."""
    found: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for case in dict.fromkeys(record["case"] for record in records):
        for record in (record for record in records if record["case"] == case):
            for model, figures in record["models"].items():
                found.setdefault((case, model), []).append((record, figures))
    return found


def render(records: list[dict[str, Any]]) -> str:
    """Results as a table in Markdown.

    Args:
        records: What `run.py` has written, one of each case and seed.
    """
    header = (
        "| case | model | test accuracy (95% interval) | parameters | MACs | bytes | ms at batch 1, 1 / 2 threads "
        "| ms at batch 32, 1 / 2 threads | faster at batch 1 |"
    )
    lines = [header, "| --- " * (header.count("|") - 1) + "|"]
    for record in records:
        case = f"{record['case']}, seed {record['seed']}"
        original = record["original"]
        lines.append(_row(case, "the original in torch", original, "torch_ms", None))
        lines.append(_row(case, "the original in ONNX Runtime", original, "ms", None))
        lines += [_row(case, name, model, "ms", original) for name, model in record["models"].items()]
    return "\n".join(lines)


def paired(records: list[dict[str, Any]]) -> str:
    """Which test samples one of two models alone gets right, of all seeds of each case, as a table in Markdown.

    The interval is that of the difference given how many samples tell the two apart (Wilson's, of the share lost).
    Seeds that test on the same samples count as if they were others.

    Args:
        records: What `run.py` has written, one of each case and seed.
    """
    lines = [
        "| case | model | seeds | samples | lost | won | points lost (95% interval) | McNemar's p |",
        "| --- " * 8 + "|",
    ]
    for (case, model), found in _by_model(records).items():
        samples = sum(record["test_samples"] for record, _ in found)
        lost, won = (sum(figures[key] for _, figures in found) for key in ("lost", "won"))
        points = "0.00 | 1.00"
        if apart := lost + won:
            test = binomtest(lost, apart)
            low, high = (100 * (2 * share - 1) * apart / samples for share in test.proportion_ci(method="wilson"))
            p_value = f"{test.pvalue:.2f}" if test.pvalue >= 0.005 else "< 0.01"
            points = f"{100 * (lost - won) / samples:.2f} ({low:.2f} to {high:.2f}) | {p_value}"
        lines.append(f"| {case} | {model} | {len(found)} | {samples:,} | {lost} | {won} | {points} |")
    return "\n".join(lines)


def searches(records: list[dict[str, Any]]) -> str:
    """What share of their common box the searches' fronts dominate as a table in Markdown.

    Args:
        records: What `run.py` has written, one of each case and seed; those with one search alone are left out.
    """
    rows: dict[str, str] = {}  # A study's result.json and its searches.json may both tell of its searches.
    for record in records:
        volumes = record.get("hypervolume", {})
        if len(volumes) > 1:
            trials = record["trials"]["joint"] if isinstance(record["trials"], dict) else record["trials"]
            cells = (f"{volumes[name]:.3f}" if name in volumes else "" for name in ("joint", "sequence", "optuna"))
            rows[f"{record['case']}, seed {record['seed']}"] = f"{trials} | {' | '.join(cells)}"
    header = ["| case | trials of the joint one | joint | in sequence | Optuna's TPE |", "| --- " * 5 + "|"]
    return "\n".join([*header, *(f"| {name} | {row} |" for name, row in rows.items())])


def _row(case: str, name: str, figures: dict[str, Any], milliseconds: str, original: dict[str, Any] | None) -> str:
    def count(key: str) -> str:
        if original is None:
            return f"{figures[key]:,}"
        share = figures[f"{key}_share"]
        return f"{figures[key]:,} ({1 - share:.1%} fewer)" if share < 1 else f"{figures[key]:,}"

    def times(batch: int) -> str:
        return " / ".join(f"{figures[f'{milliseconds}_batch{batch}_threads{threads}']:.3f}" for threads in (1, 2))

    accuracy = f"{figures['accuracy']:.2%} ({figures['accuracy_low']:.1%} to {figures['accuracy_high']:.1%})"
    speedup = "torch_speedup" if milliseconds == "torch_ms" else "speedup"
    faster = f"{figures[f'{speedup}_batch1_threads1']:.1f}x"
    counts = " | ".join(count(key) for key in ("params", "macs", "bytes"))
    return f"| {case} | {name} | {accuracy} | {counts} | {times(1)} | {times(32)} | {faster} |"


if __name__ == "__main__":
    main()
