"""How well early reports rank trials: Kendall's tau between each step's accuracy and the last one's.

    python benchmarks/fidelity.py --task digits --out benchmarks/results
    python benchmarks/fidelity.py --task vision --out benchmarks/results
    python benchmarks/fidelity.py --task transformer --sentences FOLDER --out benchmarks/results

Random configs in three bands of sparsity, all trained in full, on the demo's digits, on a vision transformer for
them, or on a small transformer for sentences (FOLDER holds rt-polarity.pos and rt-polarity.neg). Step 1 is the
compressed model before any training, each further step an epoch later. A band's tau is over the pairs of trials within
it; tau-b, so that ties count for neither side.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from small_tasks import digits_task, sentence_task, vision_task

import ray_nascomp as nc
from ray_nascomp.space import Space

BANDS = {"low": (0.0, 0.3), "middle": (0.3, 0.6), "high": (0.6, 0.9)}


def band_configs(task: nc.Task, count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """As many random configs of the task's space in each band, their sparsities drawn from it group by group."""
    space, rng = Space(nc.compression_space(task)), np.random.default_rng(seed)
    configs = []
    for name, (lower, upper) in BANDS.items():
        for _ in range(count):
            config = space.sample(rng)
            for group in config["prune"]["sparsity"]:
                config["prune"]["sparsity"][group] = round(
                    0.05 * int(rng.integers(round(lower * 20), round(upper * 20) + 1)), 2
                )
            configs.append((name, config))
    return configs


def taus(trials: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Band ("all" for all trials) -> tau of each step but the last with the last."""
    groups = {name: [trial["accuracy"] for trial in trials if trial["band"] == name] for name in BANDS}
    groups["all"] = [trial["accuracy"] for trial in trials]
    table = {}
    for name, curves in groups.items():
        if len(curves) < 2:
            continue
        values = np.array(curves)
        table[name] = [round(float(kendalltau(step, values[:, -1]).statistic), 3) for step in values.T[:-1]]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["digits", "vision", "transformer"], required=True)
    parser.add_argument("--sentences", type=Path, help="folder with rt-polarity.pos and rt-polarity.neg")
    parser.add_argument("--trials", type=int, default=12, help="trials a band (default: 12)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True, help="folder for the raw output")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.task == "transformer" and (arguments.sentences is None or not arguments.sentences.exists()):
        print("transformer: skipped, --sentences FOLDER does not name the sentences")
        return
    make = {"digits": digits_task, "vision": vision_task, "transformer": lambda: sentence_task(arguments.sentences)}
    task = make[arguments.task]()
    trials: list[dict[str, Any]] = []
    for band, config in band_configs(task, arguments.trials, seed=0):
        start = time.perf_counter()
        steps = [step.metrics for step in nc.compress_steps(task, config, arguments.epochs)]
        seconds = time.perf_counter() - start
        if steps[-1]["feasible"]:
            curves = {name: [metrics[name] for metrics in steps] for name in ("accuracy", "accuracy_drop")}
            known = {name: steps[-1][name] for name in ("size_mb", "params", "macs", "speedup")}
            trials.append({"band": band, "config": config, "seconds": round(seconds, 1), **curves, **known})
        print(band, [round(metrics["accuracy"], 3) for metrics in steps], f"{seconds:.0f} s", flush=True)
        record = {"task": arguments.task, "epochs": arguments.epochs, "tau": taus(trials), "trials": trials}
        (arguments.out / f"fidelity_{arguments.task}.json").write_text(json.dumps(record) + "\n")
    for band, row in taus(trials).items():
        print(f"{band:7}", row, flush=True)


if __name__ == "__main__":
    main()
