"""Our searcher under a trainable of one's own, which calls `nc.compress` and adds what it likes."""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
import torch
from digits import load_splits, train_network
from ray import tune

import ray_nascomp as nc
from ray_nascomp.searchers import EvolutionarySearch

# Any reported metric can be an objective, also one that the trainable makes up.
GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("price", "min")])


def compress_and_price(config: dict, task: nc.Task) -> None:
    torch.set_num_threads(1)
    step = nc.compress(task, config, epochs=config["epochs"])
    price = 100 * step.metrics["size_mb"] + 10 * step.metrics["latency_ms"]
    tune.report({**step.metrics, "price": price})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=12)
    arguments = parser.parse_args()

    train, val, _ = load_splits()
    torch.set_num_threads(1)
    task = nc.Task(train_network(train), train, val)
    space = nc.compression_space(task, sparsities="uniform")
    space["quantize"]["bits"] = 8  # A plain value fixes a dimension,
    space["epochs"] = tune.choice([1, 2, 3])  # and a key of one's own passes through.

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_parameters(compress_and_price, task=task),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(GOAL, seed=0),
            num_samples=arguments.trials,
            max_concurrent_trials=2,
            reuse_actors=True,
        ),
    )
    results = nc.Results(tuner.fit(), goal=GOAL)
    print(results.pareto_front()[["accuracy", "price", "size_mb", "latency_ms", "prune/sparsity", "epochs"]])


if __name__ == "__main__":
    main()
