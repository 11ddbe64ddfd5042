"""How much of the front searchers find in how many trials, on tables of real results.

    python benchmarks/search_quality.py --problems macro digits-cnn --searchers random evolutionary+costs
    python benchmarks/search_quality.py --suite constraint     # the first objective at its 0.95 quantile or better
    python benchmarks/search_quality.py --suite speed          # what a suggestion costs, 30 dimensions
    python benchmarks/search_quality.py --render               # docs/guides/searchers.md from the results alone

Searchers named `+costs` are told what is known before a trial, the others learn it from trials; `/8`
means that eight trials run at any time; `-screening`, `-roles` and `-network` take away a part of ours.

Each run's hypervolume is a share of the hypervolume of the table's own front, in two boxes that both
begin at each objective's best value: `front` reaches to the worst value of each objective on the
table's front, `accurate` to the median of the first objective and the worst of the others. A run that
is in the results is not made again, so that a long comparison can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from search_peers import SEARCHERS
from search_problems import MACRO, PROBLEMS, constrained, measures
from search_render import render
from search_speed import measure_speed

from ray_nascomp.pareto import front_indices

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = (25, 50, 70, 100, 120, 200)


def compare(problems: list[str], searchers: list[str], seeds: range, trials: int) -> None:
    """Runs what the results do not hold yet, seed by seed, so that all searchers have as many."""
    made = {name: PROBLEMS[name]() for name in problems}
    boxes = {name: measures(*problem) for name, problem in made.items()}
    for seed in seeds:
        for name in problems:
            file, empty = f"search_quality_{name}", {"problem": name, "checkpoints": CHECKPOINTS, "runs": {}}
            for searcher in searchers:
                made_before = _read(file, empty)["runs"].get(searcher, [])
                if any(run["seed"] == seed and run["trials"] >= trials for run in made_before):
                    continue
                start = time.process_time()
                results = list(SEARCHERS[searcher](made[name][0], seed, trials))
                seconds = (time.process_time() - start) / trials
                reached = [n for n in CHECKPOINTS if n <= trials]
                curves = {box: [share(results[:n]) for n in reached] for box, share in boxes[name].items()}
                # Read anew: another process may have added runs of its own.
                record = _read(file, empty)
                others = [run for run in record["runs"].get(searcher, []) if run["seed"] != seed]
                run = {"seed": seed, "trials": trials, "cpu_seconds_a_trial": round(seconds, 5), **curves}
                record["runs"][searcher] = sorted([*others, run], key=lambda run: run["seed"])
                _write(file, record)
                print(
                    f"{name:18} {searcher:28} seed {seed} {curves['front'][-1]:.3f} {seconds * 1e3:.0f} ms", flush=True
                )


def compare_constrained(problems: list[str], searchers: list[str], seeds: range, trials: int) -> None:
    """Counts feasible results, each once, and those on the found front, under a bound that only trials tell."""
    for name in problems:
        table, rows = PROBLEMS[name]()
        problem = constrained(table, rows)
        record = _read("search_constraint", {})
        there = sum(problem.goal.is_feasible(row) for row in rows)
        record.setdefault(name, {})["all of the table"] = [
            {"feasible": there, "front": len(front_indices(problem.goal, rows))}
        ]
        for searcher in searchers:
            for seed in seeds:
                runs = record.setdefault(name, {}).setdefault(searcher, [])
                if any(run["seed"] == seed for run in runs):
                    continue
                results = list(SEARCHERS[searcher](problem, seed, trials))
                front = len(front_indices(problem.goal, results))
                # Samplers that suggest a config again find no more by it.
                feasible = len({tuple(metrics.values()) for metrics in results if problem.goal.is_feasible(metrics)})
                runs.append({"seed": seed, "trials": trials, "feasible": feasible, "front": front})
                print(f"{name:18} {searcher:28} seed {seed} feasible {feasible} on the front {front}", flush=True)
                _write("search_constraint", record)


def _read(name: str, empty: dict[str, Any]) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else empty


def _write(name: str, record: dict[str, Any]) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["quality", "constraint", "speed"], default="quality")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--searchers", nargs="+", default=list(SEARCHERS), choices=list(SEARCHERS))
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 10), metavar=("FIRST", "END"))
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--render", action="store_true", help="only write the documentation")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    problems = [name for name in arguments.problems if name != "macro" or MACRO.exists()]
    if len(problems) < len(arguments.problems):
        print(f"macro: skipped, {MACRO} is absent")
    seeds = range(*arguments.seeds)
    if not arguments.render:
        if arguments.suite == "speed":
            _write("search_speed", {**_read("search_speed", {}), **measure_speed(arguments.searchers)})
        else:
            suite = compare if arguments.suite == "quality" else compare_constrained
            suite(problems, arguments.searchers, seeds, arguments.trials)
    render(RESULTS)


if __name__ == "__main__":
    main()
