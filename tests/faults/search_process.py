"""A search in a process of its own, to be killed: `python search_process.py FOLDER start|restore [options]`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")

import ray
from ray import tune

import ray_nascomp as nc
from ray_nascomp.recorded import recorded
from ray_nascomp.searchers import EvolutionarySearch

GOAL = nc.Goal([nc.Objective("error", "min"), nc.Objective("size", "min")])
SPACE = {f"layer{i}": {"width": tune.quniform(0, 1, 0.05), "bits": tune.choice([2, 4, 8])} for i in range(3)}
STEPS = 2


def evaluate(config):
    """A smooth conflict between two objectives, exactly repeatable."""
    layers = [config[f"layer{i}"] for i in range(3)]
    size = sum(layer["width"] * layer["bits"] for layer in layers)
    error = sum((1 - layer["width"]) ** 2 / (i + 1) + 1 / layer["bits"] for i, layer in enumerate(layers))
    return {"error": error, "size": size}


class Counted(tune.Trainable):
    """Writes down each step that it computes; dies in a share of trials if told so."""

    def setup(self, config, computed, seconds, deaths):
        self._computed, self._seconds, self._deaths = computed, seconds, deaths
        self._position = 0

    def reset_config(self, new_config):
        self._position = 0
        return True

    def step(self):
        if self._position >= STEPS:
            return {"__duplicate__": True, "done": True}
        text = json.dumps(self.config, sort_keys=True)
        if self._deaths and random.Random(text).random() < self._deaths and self._position == 1:
            marker = Path(f"{self._computed}.died-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self._seconds)
        self._position += 1
        with open(self._computed, "a") as file:
            file.write(json.dumps({"config": text, "step": self._position}) + "\n")
        return {**evaluate(self.config), "final": self._position == STEPS}

    def save_checkpoint(self, checkpoint_dir):
        return {"position": self._position}

    def load_checkpoint(self, checkpoint):
        self._position = checkpoint["position"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("how", choices=["start", "restore"])
    parser.add_argument("--computed", required=True)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--deaths", type=float, default=0.0)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=options.parallel, include_dashboard=False, log_to_driver=False)
    trainable = tune.with_parameters(
        recorded(Counted), computed=options.computed, seconds=options.seconds, deaths=options.deaths
    )
    if options.how == "restore":
        tuner = nc.restore(str(options.folder), trainable)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=SPACE,
            tune_config=tune.TuneConfig(
                search_alg=EvolutionarySearch(GOAL, seed=7),
                num_samples=options.trials,
                max_concurrent_trials=options.parallel,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=str(options.folder.parent),
                name=options.folder.name,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=3),
            ),
        )
    grid = tuner.fit()
    results = [
        {"trial_id": r.metrics["trial_id"], "config": r.config, "error": r.metrics["error"], "size": r.metrics["size"]}
        for r in grid
    ]
    Path(f"{options.computed}.results.json").write_text(json.dumps(results))
    ray.shutdown()


if __name__ == "__main__":
    main()
