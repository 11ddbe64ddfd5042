"""Tune's own overhead under our searcher and scheduler, and memory of workers that are used again and again.

    python benchmarks/overhead.py noop --trials 200 --out benchmarks/results
    python benchmarks/overhead.py memory --trials 200 --out benchmarks/results

`noop`: trials a second that report once and do nothing, with EvolutionarySearch and ParetoASHAScheduler against
Tune's BasicVariantGenerator and FIFO, in turn in the same process, on two workers that are reused. `memory`: resident
memory of a reused worker after each real trial of one epoch on a small network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import psutil
import ray
import torch
from ray import tune
from torch import nn

import ray_nascomp as nc
from ray_nascomp.schedulers import ParetoASHAScheduler
from ray_nascomp.searchers import EvolutionarySearch

NOOP_GOAL = nc.Goal([nc.Objective("error", "min"), nc.Objective("size", "min")])
SPACE = {f"layer{i}": tune.quniform(0, 1, 0.05) for i in range(20)}


class Noop(tune.Trainable):
    def setup(self, config: dict[str, Any]) -> None:
        self._config = config

    def step(self) -> dict[str, Any]:
        values = list(self._config.values())
        return {"error": sum((1 - value) ** 2 for value in values), "size": sum(values), "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._config = new_config
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to keep."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing was kept."""


def noop(trials: int, out: Path) -> None:
    record: dict[str, Any] = {"trials": trials, "rounds": []}
    for number in range(3):
        row = {}
        for name in ("tune", "ours"):
            ours = {
                "search_alg": EvolutionarySearch(NOOP_GOAL, seed=0),
                "scheduler": ParetoASHAScheduler(NOOP_GOAL, max_t=9),
            }
            folder = tempfile.mkdtemp()
            tuner = tune.Tuner(
                Noop,
                param_space=SPACE,
                tune_config=tune.TuneConfig(
                    num_samples=trials, max_concurrent_trials=2, reuse_actors=True, **(ours if name == "ours" else {})
                ),
                run_config=tune.RunConfig(storage_path=folder, name=name, verbose=0),
            )
            start = time.perf_counter()
            tuner.fit()
            row[name] = round(trials / (time.perf_counter() - start), 2)
            shutil.rmtree(folder)
        record["rounds"].append(row)
        print(number, row, round(row["ours"] / row["tune"], 2), flush=True)
        (out / "overhead_noop.json").write_text(json.dumps(record) + "\n")


def memory(trials: int, out: Path) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.rand(256, 1, 8, 8), torch.arange(256) % 10
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 64, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    task = nc.Task(network.eval(), (inputs, labels), (inputs, labels))
    goal = nc.Goal([nc.Objective("accuracy"), nc.Objective("size_mb", "min")])
    folder = Path(tempfile.mkdtemp())
    made = nc.compression_trainable(task, goal, epochs=1, cache=folder / "cache")

    class Weighed(made):  # type: ignore[misc, valid-type]
        def step(self) -> dict[str, Any]:
            result = super().step()
            return {**result, "resident_mb": psutil.Process().memory_info().rss / 1e6}

    tuner = tune.Tuner(
        Weighed,
        param_space=nc.compression_space(task),
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(goal, nc.CostModel(task), seed=0),
            num_samples=trials,
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name="memory", verbose=0),
    )
    rows = sorted((result.metrics for result in tuner.fit()), key=lambda metrics: metrics["timestamp"])
    megabytes = [round(row["resident_mb"], 1) for row in rows]
    workers = len({row["pid"] for row in rows})
    record = {"trials": len(rows), "workers": workers, "resident_mb": megabytes}
    (out / "overhead_memory.json").write_text(json.dumps(record) + "\n")
    print({n: megabytes[n - 1] for n in (1, 5, 20, 50, 100, 150, 200) if n <= len(rows)}, "workers", workers)
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["noop", "memory"])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, help="folder for the raw output")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    {"noop": noop, "memory": memory}[arguments.what](arguments.trials, arguments.out.resolve())


if __name__ == "__main__":
    main()
