"""A stock Tune script with our search space and trainable dropped in: random search and Tune's own ASHA.

The scalar `score`, made from the goal, is what searchers and schedulers with one metric look at.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
import torch
from digits import load_splits, train_network
from ray import tune
from ray.tune.schedulers import ASHAScheduler

import ray_nascomp as nc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--optuna", action="store_true", help="OptunaSearch in place of random search")
    arguments = parser.parse_args()

    train, val, test = load_splits()
    torch.set_num_threads(1)
    task = nc.Task(train_network(train), train, val, test_data=test)
    goal = nc.Goal(
        [nc.Objective("accuracy"), nc.Objective("speedup"), nc.Objective("size_mb", "min")],
        [nc.Constraint("accuracy_drop", "<=", 0.02)],
    )
    search = None
    if arguments.optuna:
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch()

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        nc.compression_trainable(task, goal, epochs=arguments.epochs),
        param_space=nc.compression_space(task, sparsities="uniform"),
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=search,
            scheduler=ASHAScheduler(max_t=arguments.epochs + 1, grace_period=2),
            num_samples=arguments.trials,
            reuse_actors=True,
        ),
    )
    grid = tuner.fit()
    best = grid.get_best_result()
    print({name: best.metrics[name] for name in ("score", "accuracy", "speedup", "size_mb", "stage")})
    print(nc.Results(grid))


if __name__ == "__main__":
    main()
