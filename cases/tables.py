"""The README's table of case studies, from the raw results: `python tables.py RESULT.json... --into README.md`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- cases: made by make case-tables -->", "<!-- end of cases -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files result.json, in the table's order")
    parser.add_argument("--into", type=Path, required=True, help="a text that gets the table between its two marks")
    arguments = parser.parse_args()
    table = render([json.loads(path.read_text()) for path in arguments.results])
    text = arguments.into.read_text()
    if BEGIN not in text or END not in text:
        parser.error(f"--into: {arguments.into} lacks the lines {BEGIN} and {END}")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    arguments.into.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text))


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
