"""What 5,000 trials cost the driver: a suggestion's time, memory, the state file, a restore, and the report.

Writes benchmarks/results/long_search.json. Searchers are driven as Tune drives them, without Ray.

    python benchmarks/long_search.py [--trials 5000]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from ray import tune

import ray_nascomp as nc
from ray_nascomp.searchers import BayesianSearch, EvolutionarySearch

RESULTS = Path(__file__).parent / "results" / "long_search.json"
GOAL = nc.Goal([nc.Objective("error", "min"), nc.Objective("size", "min")])
SPACE = {f"layer{i}": tune.uniform(0, 1) for i in range(30)}
STAGES = (100, 1000, 5000)


def known(config):
    return {"size": sum(config.values())}


def outcome(config):
    return {"error": sum((1 - v) ** 2 / (i + 1) for i, v in enumerate(config.values())), **known(config)}


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def long_search(trials: int) -> dict:
    """An evolutionary search of so many trials."""
    searcher = EvolutionarySearch(GOAL, known, seed=0)
    searcher.set_search_properties(None, None, dict(SPACE))
    times, row = [], {"searcher": "EvolutionarySearch", "memory_mb_before": round(memory_mb())}
    for number in range(trials):
        start = time.perf_counter()
        config = searcher.suggest(f"t{number}")
        times.append(time.perf_counter() - start)
        searcher.on_trial_complete(f"t{number}", {**outcome(config), "final": True, "training_iteration": 9})
        if number + 1 in STAGES:
            row[f"suggestion_ms_at_{number + 1}"] = round(1e3 * float(np.median(times[-50:])), 1)
            row[f"memory_mb_at_{number + 1}"] = round(memory_mb())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        start = time.perf_counter()
        searcher.save(str(path))
        row["save_seconds"] = round(time.perf_counter() - start, 2)
        row["state_mb"] = round(path.stat().st_size / 1e6, 1)
        start = time.perf_counter()
        EvolutionarySearch(GOAL, known, seed=0).restore(str(path))
        row["restore_seconds"] = round(time.perf_counter() - start, 2)
    return row


def bayesian(trials: int) -> dict:
    """Suggestions of a Bayesian search that has seen so many random trials."""
    searcher = BayesianSearch(GOAL, known, seed=0)
    searcher.set_search_properties(None, None, dict(SPACE))
    rng = np.random.default_rng(0)
    row = {"searcher": "BayesianSearch"}
    for number in range(trials):
        searcher._pending[f"t{number}"] = config = searcher.space.sample(rng)
        searcher.on_trial_complete(f"t{number}", {**outcome(config), "final": True, "training_iteration": 9})
        if number + 1 in STAGES:
            searcher.suggest("fits")
            searcher.on_trial_complete("fits", None, error=True)
            times = []
            for extra in range(5):
                start = time.perf_counter()
                searcher.suggest(f"extra{extra}")
                times.append(time.perf_counter() - start)
                searcher.on_trial_complete(f"extra{extra}", None, error=True)
            row[f"suggestion_ms_at_{number + 1}"] = round(1e3 * float(np.median(times)), 1)
    return row


def report(trials: int) -> dict:
    """Results and report of a folder with so many trials of 9 reports."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(trials):
            config = {name: float(rng.random()) for name in SPACE}
            place = Path(folder) / "run" / f"trial_{number:05d}"
            place.mkdir(parents=True)
            (place / "params.json").write_text(json.dumps(config))
            rows = [
                {
                    **outcome(config),
                    "trial_id": f"{number:05d}",
                    "training_iteration": i,
                    "final": i == 9,
                    "timestamp": i,
                }
                for i in range(1, 10)
            ]
            (place / "result.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
        start = time.perf_counter()
        results = nc.Results(Path(folder) / "run", GOAL)
        opened = time.perf_counter()
        path = results.report(Path(folder) / "report.html")
        return {
            "trials": len(results),
            "open_seconds": round(opened - start, 1),
            "report_seconds": round(time.perf_counter() - opened, 1),
            "report_mb": round(path.stat().st_size / 1e6, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5000)
    trials = parser.parse_args().trials
    rows = []
    for part in (long_search, bayesian, report):
        rows.append(part(trials))
        print(rows[-1], flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
