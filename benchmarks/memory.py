"""Memory of a worker that Tune reuses: after each trial of a search, with export and measurement.

    python benchmarks/memory.py --trials 200 --out benchmarks/results

Random configs of the demo's digits network, one epoch each, all in one worker. After each trial the driver reads the
worker's resident memory (RSS) and what of it is its own (USS, without pages that are shared).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

_EXAMPLES = str(Path(__file__).parents[1] / "examples")  # Workers import the demo's network.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_EXAMPLES, os.environ.get("PYTHONPATH")]))

import psutil
import ray
from ray import tune
from small_tasks import digits_task

import ray_nascomp as nc

GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("size_mb", "min")])


class MemoryCallback(tune.Callback):
    """Notes the memory of a trial's worker when the trial ends, in MB, and writes all notes to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        memory = psutil.Process(trial.last_result["pid"]).memory_full_info()
        self.rows.append(
            {
                "pid": trial.last_result["pid"],
                "rss_mb": round(memory.rss / 1e6, 1),
                "uss_mb": round(memory.uss / 1e6, 1),
                "seconds": round(trial.last_result["time_total_s"], 1),
            }
        )
        self.file.write_text(json.dumps({"task": "digits", "epochs": 1, "trials": self.rows}) + "\n")
        if len(self.rows) % 20 == 0:
            print(len(self.rows), self.rows[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, help="folder for the raw output")
    arguments = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    task = digits_task()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="warning")
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            nc.compression_trainable(task, GOAL, epochs=1),
            param_space=nc.compression_space(task),
            tune_config=tune.TuneConfig(num_samples=arguments.trials, max_concurrent_trials=1, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=folder, verbose=0, callbacks=[MemoryCallback(arguments.out.resolve() / "memory.json")]
            ),
        ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
