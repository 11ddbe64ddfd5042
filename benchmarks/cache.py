"""What the stage cache and the reuse of workers are worth on the demo's joint space.

    python benchmarks/cache.py rates --out benchmarks/results
    python benchmarks/cache.py throughput --trials 16 --out benchmarks/results
    python benchmarks/cache.py throughput --trials 40 --late-moves 0.8 --out benchmarks/results

`rates`: the share of stages (structure, epochs, exported files) that a trial finds in the cache, trial by trial, for
each searcher. Nothing is trained: the keys follow from the configs, and the searchers learn from a formula. Of 3
epochs a trial. `throughput`: trials an hour with the cache, with the reuse of workers, with both, with neither, and
with both when the same search is made again. One trial at a time, so that all make the same search and the fronts can
be compared. An hour of processor time says more than one of the clock on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

_EXAMPLES = str(Path(__file__).parents[1] / "examples")  # Workers import the demo's network.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_EXAMPLES, os.environ.get("PYTHONPATH")]))

import numpy as np
import psutil
import ray
import torch
from ray import tune
from small_tasks import joint_task

import ray_nascomp as nc
from ray_nascomp.errors import InfeasibleError
from ray_nascomp.pipeline.recipe import Recipe
from ray_nascomp.searchers import BayesianSearch, EvolutionarySearch, GoalSearcher, GreedySearch, HybridSearch

EPOCHS = 3
GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("size_mb", "min")], [nc.Constraint("accuracy_drop", "<=", 0.02)])


class RandomSearch(GoalSearcher):
    def propose(self) -> dict[str, Any]:
        return self.space.sample(self.rng)


SEARCHERS: dict[str, Callable[..., GoalSearcher]] = {
    "random": RandomSearch,
    "evolutionary": EvolutionarySearch,
    "late moves": partial(EvolutionarySearch, late_moves=0.75),
    "bayesian": BayesianSearch,
    "hybrid": HybridSearch,
    "greedy": partial(GreedySearch, metric="size_mb"),
}


def keys(task: nc.Task, costs: nc.CostModel, config: Mapping[str, Any]) -> list[str]:
    """What a trial looks up: the structure's stages, each epoch, the first and the last file."""
    plan = costs.plan(config)
    recipe = Recipe(task, plan, costs, EPOCHS)
    start = min(EPOCHS - 1, round(EPOCHS * plan.quantize.start)) if plan.quantize.trains else EPOCHS
    if plan.quantize.is_identity:
        start = EPOCHS
    trained = [recipe.trained(epoch + 1, epoch >= start) for epoch in range(EPOCHS)]
    structure = [recipe.structure(stages) for stages in range(1, len(recipe.stages) + 1)]
    return [*structure, *trained, recipe.exported(recipe.ready()), recipe.exported(trained[-1])]


def pretended(costs: nc.CostModel, config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, float]:
    """A result by formula: what is removed costs accuracy, ever more of it; bits and learning rate a little."""
    known = costs(config)
    drop = 0.002 * known["macs_ratio"] ** 0.8 + 0.003 * (np.log10(config["finetune"]["lr"]) + 2.5) ** 2
    drop += 0.001 * rng.standard_normal()
    return {**known, "accuracy": 0.99 - drop, "accuracy_drop": drop, "final": True, "training_iteration": EPOCHS + 1}


def rates(trials: int, out: Path) -> None:
    task = joint_task(epochs=0)
    costs = nc.CostModel(task)
    record: dict[str, Any] = {"epochs": EPOCHS, "trials": trials, "hits": {}}
    for bits in ("layer", "uniform"):
        for name, make in SEARCHERS.items():
            searcher = make(GOAL, costs, seed=0)
            searcher.set_search_properties(None, None, nc.compression_space(task, bits=bits), num_samples=trials)
            rng, known, hits = np.random.default_rng(0), set[str](), []
            for number in range(trials):
                config: Any = searcher.suggest(str(number))
                if not isinstance(config, dict):
                    break
                try:
                    looked_up = keys(task, costs, config)
                    result = pretended(costs, config, rng)
                except InfeasibleError:
                    continue
                hits.append(float(np.mean([key in known for key in looked_up])))
                known.update(looked_up)
                searcher.on_trial_complete(str(number), result)
            record["hits"][f"{name}, bits by {bits}"] = [round(hit, 3) for hit in hits]
            parts = np.array_split(hits, 4)
            print(f"{name:13} bits by {bits:8}", [round(float(p.mean()), 3) for p in parts], len(hits), flush=True)
            (out / "cache_rates.json").write_text(json.dumps(record) + "\n")


class ProcessorTime(tune.Callback):
    """Processor time of each worker that has reported, from its start, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        times = psutil.Process(result["pid"]).cpu_times()
        self.seconds[result["pid"]] = times.user + times.system


def throughput(trials: int, late_moves: float, out: Path) -> None:
    task = joint_task()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="warning")
    folder = Path(tempfile.mkdtemp())
    caches = {"cache": str(folder / "alone"), "both": str(folder / "with_reuse"), "again": str(folder / "with_reuse")}
    record: dict[str, Any] = {"trials": trials, "epochs": EPOCHS, "late_moves": late_moves, "modes": {}}
    target = out / f"cache_throughput{'_late_moves' if late_moves else ''}.json"
    for mode in ("neither", "both", "again", "reuse", "cache"):
        workers = ProcessorTime()
        tuner = tune.Tuner(
            nc.compression_trainable(task, GOAL, epochs=EPOCHS, cache=caches.get(mode)),
            param_space=nc.compression_space(task, bits="layer"),
            tune_config=tune.TuneConfig(
                search_alg=EvolutionarySearch(GOAL, nc.CostModel(task), seed=0, late_moves=late_moves),
                num_samples=trials,
                max_concurrent_trials=1,
                reuse_actors=mode in ("reuse", "both", "again"),
            ),
            run_config=tune.RunConfig(name=mode, storage_path=str(folder), verbose=0, callbacks=[workers]),
        )
        start, start_cpu = time.perf_counter(), time.process_time()
        results = nc.Results(tuner.fit())
        seconds = time.perf_counter() - start
        seconds_cpu = time.process_time() - start_cpu + sum(workers.seconds.values())
        rows = [trial.metrics for trial in results.trials]
        hits, misses = (sum(row[f"cache_{name}"] for row in rows) for name in ("hits", "misses"))
        record["modes"][mode] = {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(seconds_cpu, 1),
            "trials_an_hour": round(3600 * trials / seconds, 1),
            "trials_a_cpu_hour": round(3600 * trials / seconds_cpu, 1),
            "hits": hits,
            "misses": misses,
            "front": sorted([row["accuracy"], row["size_mb"]] for row in (t.metrics for t in results.front())),
        }
        print(mode, record["modes"][mode], flush=True)
        target.write_text(json.dumps(record) + "\n")
    ray.shutdown()
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", "throughput"])
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--late-moves", type=float, default=0.0, help="share of throughput's children with other bits")
    parser.add_argument("--out", type=Path, required=True, help="folder for the raw output")
    arguments = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.what == "rates":
        rates(arguments.trials, arguments.out.resolve())
    else:
        throughput(arguments.trials, arguments.late_moves, arguments.out.resolve())


if __name__ == "__main__":
    main()
