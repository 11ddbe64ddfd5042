"""What the HuggingFace examples share: architecture and bits searched together, the best model exported."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
from ray import tune

import ray_nascomp as nc
from ray_nascomp.schedulers import ParetoASHAScheduler
from ray_nascomp.searchers import EvolutionarySearch


def parser(description: str | None, model: str, dataset: str) -> argparse.ArgumentParser:
    """Arguments of all examples; a name on the hub can be a local folder everywhere."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=model, help="a name on the hub or a folder")
    made.add_argument("--dataset", default=dataset, help="a name on the hub or a folder")
    made.add_argument("--trials", type=int, default=32)
    made.add_argument("--epochs", type=int, default=2, help="epochs of a trial")
    made.add_argument("--tuning-epochs", type=float, default=2, help="epochs before the search")
    made.add_argument("--output", type=Path, default=Path("out"))
    return made


def search(task: nc.HuggingFaceTask, arguments: argparse.Namespace) -> None:
    """Searches depth, heads, widths, bits and training of a fine-tuned task's model."""
    print(f"{task.metric} before: {task.evaluate(task.predict(task.model)):.4f}")
    task = task.elastic()
    space = nc.compression_space(task, max_sparsity=0.5)
    del space["prune"]  # Heads and neurons are part of the architecture already.
    goal = nc.Goal([nc.Objective(task.metric, mode=task.mode), nc.Objective("speedup"), nc.Objective("size_mb", "min")])
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        nc.compression_trainable(task, goal, epochs=arguments.epochs),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(goal, cost_model=nc.CostModel(task), seed=0),
            scheduler=ParetoASHAScheduler(goal, max_t=arguments.epochs + 1),
            num_samples=arguments.trials,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(arguments.output.resolve()), name="search"),
    )
    results = nc.Results(tuner.fit())
    results.retime(task)
    results.report(arguments.output / "report.html")
    best = results.best()
    best.export(arguments.output / "model.onnx")
    print("\n".join(f"{name}: {value:.4g}" for name, value in best.evaluate(task=task).items()))
