"""The main job on real data: a joint search, its front, and a compressed model on disk.

Run it with `make demo`, or `python examples/demo.py --help`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
import torch
from digits import build, load_splits, train_network
from ray import tune
from rich.console import Console
from rich.table import Table

import ray_nascomp as nc
from ray_nascomp.results import FrontReporter
from ray_nascomp.schedulers import ParetoASHAScheduler
from ray_nascomp.searchers import EvolutionarySearch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=64, help="number of trials (default: 64)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of a trial (default: 3)")
    parser.add_argument("--refine", type=int, default=12, help="epochs of the chosen model (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network and of the search (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: demo_output)")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    console = Console(highlight=False)
    start = time.monotonic()

    console.rule("1. A network to compress")
    train, val, test = load_splits()
    torch.set_num_threads(1)
    network = train_network(train, seed=arguments.seed)
    task = nc.Task(
        network,
        train,
        val,
        test_data=test,
        build=build,
        architecture={
            "depth": tune.choice([2, 3, 4]),
            "width": tune.choice([0.5, 0.75, 1.0]),
            "kernel": tune.choice([3, 5]),
        },
    )
    accuracy = task.evaluate(task.predict(network))
    size = sum(parameter.numel() for parameter in network.parameters())
    console.print(f"{size:,} parameters, {accuracy:.1%} of the validation digits right")

    console.rule("2. A joint search over architecture, pruning, quantization and training")
    goal = nc.Goal(
        objectives=[nc.Objective("accuracy"), nc.Objective("speedup"), nc.Objective("size_mb", mode="min")],
        constraints=[nc.Constraint("accuracy_drop", "<=", 0.01), nc.Constraint("size_ratio", ">=", 32)],
    )
    name = time.strftime("search_%Y-%m-%d_%H-%M-%S")  # Each run is a search of its own.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
    tuner = tune.Tuner(
        nc.compression_trainable(task, goal, epochs=arguments.epochs),
        param_space=nc.compression_space(task, bits="layer"),
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(goal, cost_model=nc.CostModel(task), seed=arguments.seed),
            scheduler=ParetoASHAScheduler(goal, max_t=arguments.epochs + 1),
            num_samples=arguments.trials,
            max_concurrent_trials=2,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(output), callbacks=[FrontReporter(goal)], verbose=0),
    )
    results = nc.Results(tuner.fit())
    ray.shutdown()
    results.retime()

    console.rule("3. The front")
    console.print(front_table(results))
    report = results.report(output / "report.html")

    console.rule("4. The chosen model, trained to the end and judged on digits that the search never saw")
    try:
        chosen = results.best("accuracy")
    except nc.ConfigError as error:  # With a few trials none may be good enough.
        console.print(str(error))
        completed = [trial for trial in results.trials if trial.status == "completed"]
        chosen = results.trial(min(completed, key=lambda trial: goal.violation(trial.metrics)).trial_id)
    console.print(f"trial {chosen.trial_id}: {json.dumps(chosen.config)}", soft_wrap=True)
    final = chosen.refine(arguments.refine, folder=output / "refined")
    measured = final.evaluate()
    model = final.export(output / "model.onnx")
    (output / "metrics.json").write_text(json.dumps(measured, indent=1))
    console.print(gains_table(measured))
    console.print(f"report  {report}\nmodel   {model}\nfigures {output / 'metrics.json'}", soft_wrap=True)
    console.print(f"done in {time.monotonic() - start:.0f} s")


def front_table(results: nc.Results) -> Table:
    """The front as a table for the terminal."""
    table = Table("trial", "accuracy", "speedup", "size", "params", "bits", "depth", "pruning")
    for trial in results.front():
        metrics, config = trial.metrics, trial.config
        table.add_row(
            trial.trial_id,
            f"{metrics['accuracy']:.1%}",
            f"{metrics['speedup']:.1f}x",
            f"{metrics['size_mb'] * 1000:.1f} kB",
            f"{metrics['params']:,.0f}",
            bits_of(config),
            str(config["architecture"]["depth"]),
            config["prune"]["method"],
        )
    return table


def bits_of(config: dict) -> str:
    """How many layers have which bits: "3x8 2x32"."""
    bits = list(config["quantize"]["bits"].values())
    return " ".join(f"{bits.count(value)}x{value}" for value in sorted(set(bits)))


def gains_table(measured: dict[str, float]) -> Table:
    """The original and the compressed model side by side."""
    table = Table("exported file, ONNX Runtime, one thread", "original", "compressed", "gain")
    table.add_row(
        "accuracy on the test set",
        f"{measured['accuracy_original']:.2%}",
        f"{measured['accuracy']:.2%}",
        f"{-100 * measured['accuracy_drop']:+.2f} points",
    )
    table.add_row(
        "size on disk",
        f"{measured['size_mb_original'] * 1000:.1f} kB",
        f"{measured['size_mb'] * 1000:.1f} kB",
        f"{measured['size_ratio']:.1f}x smaller",
    )
    for batch in (1, 32):
        table.add_row(
            f"latency at batch {batch}",
            f"{measured[f'latency_ms_original_batch_{batch}']:.4f} ms",
            f"{measured[f'latency_ms_batch_{batch}']:.4f} ms",
            f"{measured[f'speedup_batch_{batch}']:.1f}x faster",
        )
    return table


if __name__ == "__main__":
    main()
