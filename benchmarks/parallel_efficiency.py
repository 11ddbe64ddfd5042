"""How much of their time workers train, at 1 to 32 of them, with trials of a fixed length that only sleep.

Writes benchmarks/results/parallel_efficiency.json. A worker's time runs from the start of its first
step to the end of its last one: between them lie suggestion, log, checkpoint, and Tune's own work.

    python benchmarks/parallel_efficiency.py [--seconds 20] [--trials 3] [--workers 1 2 4 8 16 32]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import ray
from ray import tune

import ray_nascomp as nc
from ray_nascomp.recorded import recorded
from ray_nascomp.searchers import EvolutionarySearch

RESULTS = Path(__file__).parent / "results" / "parallel_efficiency.json"
STEPS = 2
GOAL = nc.Goal([nc.Objective("error", "min"), nc.Objective("size", "min")])
SPACE = {f"layer{i}": tune.uniform(0, 1) for i in range(20)}


class Sleeper(tune.Trainable):
    """Sleeps through its steps, and writes down when."""

    def setup(self, config, seconds, spans):
        self._seconds, self._spans, self._position = seconds, spans, 0

    def reset_config(self, new_config):
        self._position = 0
        return True

    def step(self):
        if self._position == STEPS:
            return {"__duplicate__": True, "done": True}
        start = time.time()
        time.sleep(self._seconds / STEPS)
        self._position += 1
        with open(self._spans, "a") as file:
            file.write(json.dumps([os.getpid(), start, time.time()]) + "\n")
        size = sum(self.config.values())
        error = sum((1 - value) ** 2 for value in self.config.values())
        return {"error": error, "size": size, "final": self._position == STEPS}

    def save_checkpoint(self, checkpoint_dir):
        return {"position": self._position}

    def load_checkpoint(self, checkpoint):
        self._position = checkpoint["position"]


def measure(workers: int, seconds: float, trials: int) -> dict[str, float]:
    """One search."""
    with tempfile.TemporaryDirectory() as folder:
        spans = Path(folder) / "spans"
        start = time.time()
        tune.Tuner(
            tune.with_parameters(recorded(Sleeper), seconds=seconds, spans=str(spans)),
            param_space=SPACE,
            tune_config=tune.TuneConfig(
                search_alg=EvolutionarySearch(GOAL, lambda config: {"size": sum(config.values())}, seed=0),
                num_samples=workers * trials,
                max_concurrent_trials=workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=folder, name="run", verbose=0),
        ).fit()
        whole = time.time() - start
        rows = [json.loads(line) for line in spans.read_text().splitlines()]
    by_worker = defaultdict(list)
    for pid, begin, end in rows:
        by_worker[pid].append((begin, end))
    busy = sum(end - begin for _, begin, end in rows)
    present = sum(max(end for _, end in steps) - min(begin for begin, _ in steps) for steps in by_worker.values())
    return {
        "workers": workers,
        "trials": len(rows) // STEPS,
        "seconds_a_trial": seconds,
        "efficiency": round(busy / present, 4),
        "wall_seconds": round(whole, 1),
        "efficiency_with_start": round(busy / (workers * whole), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    options = parser.parse_args()
    ray.init(address="local", num_cpus=max(options.workers), include_dashboard=False, log_to_driver=False)
    rows = []
    for workers in options.workers:
        rows.append(measure(workers, options.seconds, options.trials))
        print(rows[-1], flush=True)
        content = {"ray": ray.__version__, "cores": os.cpu_count(), "rows": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    ray.shutdown()


if __name__ == "__main__":
    main()
