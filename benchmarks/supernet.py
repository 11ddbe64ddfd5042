"""A supernet against training each sub-network alone: whether they rank architectures alike, and what each costs.

    python benchmarks/supernet.py --sentences FOLDER [--tasks digits sentences] [--networks 20]

Random sub-networks are judged on the validation data three ways: as slices of the model that was trained as a whole,
as slices of the supernet (both with batch normalisation estimated anew), and as slices of the model trained alone for
as many epochs as the supernet was. The last is the truth that Kendall's tau compares with; its own noise is told by
training all of them again with another seed. Seconds are the processor's. FOLDER holds rt-polarity.pos and
rt-polarity.neg (Pang and Lee 2005). Writes benchmarks/results/supernet.json, a task after the other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from small_tasks import joint_task, sentence_task

import ray_nascomp as nc
from ray_nascomp.architecture import elastic_transformer
from ray_nascomp.compression.batch_norm import reestimate_batch_norm
from ray_nascomp.pipeline.candidate import train_all
from ray_nascomp.pipeline.training import Trainer
from ray_nascomp.plan import FinetuneStage
from ray_nascomp.space import Space

RESULTS = Path(__file__).parent / "results" / "supernet.json"
SEED = 0


def elastic_sentences(folder: Path) -> nc.Task:
    task = sentence_task(folder)
    build, architecture = elastic_transformer(task.model, task=task)
    return task.with_changes(build=build, architecture=architecture)


def as_it_is(task: nc.Task, architecture: dict[str, Any]) -> float:
    """Accuracy of a sub-network without training."""
    network = task.network(architecture)
    reestimate_batch_norm(network, task.calibration_batches())
    return task.evaluate(task.predict(network))


def trained_alone(task: nc.Task, architecture: dict[str, Any], epochs: int, lr: float, seed: int) -> float:
    network = task.network(architecture)
    train_all(network)
    trainer = Trainer(task, FinetuneStage(lr=lr), epochs, seed)
    optimizer = trainer.make_optimizer(network)
    for epoch in range(epochs):
        trainer.epoch(network, optimizer, epoch)
    return task.evaluate(task.predict(network))


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.process_time()
    return function(*arguments), round(time.process_time() - start, 2)


def compare(task: nc.Task, networks: int, epochs: int, lr: float) -> dict[str, Any]:
    space = Space({"architecture": task.architecture})
    rng = np.random.default_rng(SEED)
    drawn = {space.key(config): config["architecture"] for config in (space.sample(rng) for _ in range(20 * networks))}
    architectures = list(drawn.values())[:networks]
    start = time.process_time()
    supernet = nc.train_supernet(task, epochs=epochs, lr=lr, seed=SEED)
    result: dict[str, Any] = {
        "networks": len(architectures),
        "epochs": epochs,
        "seconds_supernet": round(time.process_time() - start, 1),
        "accuracy_model": task.evaluate(task.predict(task.model)),
        "accuracy_supernet": task.evaluate(task.predict(supernet.model)),
        "rows": [],
    }
    for architecture in architectures:
        sliced, _ = timed(as_it_is, task, architecture)
        shared, shared_seconds = timed(as_it_is, supernet, architecture)
        alone, alone_seconds = timed(trained_alone, task, architecture, epochs, lr, SEED)
        again = trained_alone(task, architecture, epochs, lr, SEED + 100)
        row = {"architecture": architecture, "sliced": sliced, "supernet": shared, "alone": alone, "alone_again": again}
        result["rows"].append({**row, "seconds_look": shared_seconds, "seconds_alone": alone_seconds})
        print({key: value for key, value in row.items() if key != "architecture"}, flush=True)
    columns = {name: [row[name] for row in result["rows"]] for name in ("sliced", "supernet", "alone", "alone_again")}
    result["tau"] = {
        name: float(kendalltau(values, columns["alone"]).statistic)
        for name, values in columns.items()
        if name != "alone"
    }
    for name in ("seconds_look", "seconds_alone"):
        result[name] = float(np.mean([row[name] for row in result["rows"]]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=["digits", "sentences"])
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, tuple[Callable[[], nc.Task], float]] = {
        "digits": (joint_task, 2e-3),
        "sentences": (lambda: elastic_sentences(options.sentences), 5e-4),
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.tasks:
        make, lr = makers[name]
        results[name] = compare(make(), options.networks, options.epochs, lr)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(name, {key: value for key, value in results[name].items() if key != "rows"}, flush=True)


if __name__ == "__main__":
    main()
