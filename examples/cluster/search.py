"""A search for a cluster: started again with the same name, it goes on where it was.

python examples/cluster/search.py --storage s3://bucket/searches --name digits
"""

from __future__ import annotations

import argparse

import pyarrow.fs
import ray
import torch
from ray import tune
from sklearn.datasets import load_digits

import ray_nascomp as nc
from ray_nascomp.schedulers import ParetoASHAScheduler
from ray_nascomp.searchers import EvolutionarySearch


def make_task() -> nc.Task:
    """Handwritten digits and a small network; the same seed gives the same task, which a restore asks for."""
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.tensor(labels)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(10):
        for rows in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    return nc.Task(network.eval(), (inputs[:1200], targets[:1200]), (inputs[1200:1500], targets[1200:1500]))


def make_tuner(
    options: argparse.Namespace, task: nc.Task, goal: nc.Goal, trainable: type[tune.Trainable]
) -> tune.Tuner:
    path = f"{options.storage.rstrip('/')}/{options.name}"
    filesystem, inner = pyarrow.fs.FileSystem.from_uri(path)
    if filesystem.get_file_info(f"{inner}/tuner.pkl").type == pyarrow.fs.FileType.File:
        return nc.restore(path, trainable, restart_errored=True)
    return tune.Tuner(
        trainable,
        param_space=nc.compression_space(task),
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(goal, nc.CostModel(task), seed=0),
            scheduler=ParetoASHAScheduler(goal, max_t=options.epochs + 1),
            num_samples=options.trials,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=options.storage,
            name=options.name,
            failure_config=tune.FailureConfig(max_failures=3),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", required=True, help="a folder that all nodes reach, absolute, or a URI")
    parser.add_argument("--name", default="digits")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--edge", action="store_true", help="measure latency on nodes with the resource edge")
    options = parser.parse_args()
    ray.init()  # The cluster that RAY_ADDRESS names, or this machine.
    task = make_task()
    goal = nc.Goal(
        [nc.Objective("accuracy"), nc.Objective("speedup"), nc.Objective("size_mb", "min")],
        [nc.Constraint("accuracy_drop", "<=", 0.02)],
    )
    trainable = nc.compression_trainable(
        task,
        goal,
        epochs=options.epochs,
        time_limit_s=1800,
        latency_resources={"edge": 1} if options.edge else None,
    )
    costs = nc.CostModel(task)
    dense = costs({})["macs"]

    def resources(config: dict) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([{"CPU": 2 if costs(config)["macs"] > dense / 2 else 1}])

    results = nc.Results(make_tuner(options, task, goal, tune.with_resources(trainable, resources)).fit())
    print(results)
    print(results.pareto_front()[["accuracy", "speedup", "size_mb"]])


if __name__ == "__main__":
    main()
