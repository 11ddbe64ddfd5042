"""Random configs over five kinds of models, extremes included: each is a valid result or infeasible with a reason.

    python benchmarks/fuzz.py --configs 500 --output benchmarks/results/fuzz.json

Every config is carried out without fine-tuning, exported, and measured. What the cost model
foretold is compared with the network (parameters) and the file (bytes). Half of the configs draw
from ordinary values, half contain extremes (sparsity 0.99, rank 0.01, one bit, global sparsity).
Rows that the output already holds are not made again: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ray_nascomp as nc
from ray_nascomp.plan import bits_of, quantize_methods
from ray_nascomp.pruners import CHANNEL_METHODS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from networks import PlainNet, ResidualNet, SequenceNet
from transformer_families import make

Task = nc.Task


def image_task(network: Callable[[], torch.nn.Module]) -> Task:
    torch.manual_seed(0)
    data = (torch.randn(64, 1, 8, 8), torch.arange(64) % 10)
    return Task(uneven(network()), data, data)


def transformer_task(family: str) -> Task:
    model, inputs = make(family, "sdpa")
    inputs = {name: value.repeat(16, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    classes = model.config.num_labels
    data = (inputs, torch.arange(32) % classes)
    return Task(uneven(model), data, data)


def uneven(model: torch.nn.Module) -> torch.nn.Module:
    """Gives parameters values of their own, as training does: equal biases of fresh layers are stored once."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


KINDS: dict[str, Callable[[], Task]] = {
    "convolutions": lambda: image_task(PlainNet),
    "residual": lambda: image_task(ResidualNet),
    "recurrent": lambda: image_task(SequenceNet),
    "bert": lambda: transformer_task("bert"),
    "vit": lambda: transformer_task("vit"),
}


def random_config(spec: nc.ModelSpec, rng: np.random.Generator, extreme: bool) -> dict[str, Any]:
    """A config that names every group and layer, or all at once."""

    def values(names: list[str], choices: list[Any]) -> Any:
        drawn = [choices[int(rng.integers(len(choices)))] for _ in names]
        return dict(zip(names, drawn, strict=True)) if rng.random() < 0.7 else drawn[0]

    sparsities = [0.0, 0.1, 0.25, 0.5, 0.7] + ([0.9, 0.99, 0.999] if extreme else [])
    ranks = [1.0, 1.0, 0.8, 0.5, 0.25] + ([0.01, 0.05] if extreme else [])
    method = str(rng.choice(quantize_methods()))
    prune: dict[str, Any] = {
        "method": str(rng.choice(CHANNEL_METHODS)),
        "sparsity": values(list(spec.prunable_names), sparsities),
        "round_to": int(rng.choice([1, 4, 8])),
    }
    if method != "bnn" and rng.random() < 0.15:  # Signs have no zero.
        prune |= {"method": "level", "schedule": "one_shot"}
    elif extreme and rng.random() < 0.15:
        prune |= {"scope": "global", "sparsity": float(rng.choice([0.3, 0.95]))}
    config = {
        "prune": prune,
        "low_rank": {"rank": values(list(spec.factorisable_names), ranks), "round_to": int(rng.choice([1, 8]))},
        "quantize": {"method": method, "bits": values(list(spec.quantizable_names), list(bits_of(method)))},
    }
    if rng.random() < 0.3:
        config["order"] = ["low_rank", "prune"]
    return config


def carry_out(task: Task, costs: nc.CostModel, config: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    foretold: dict[str, float] | None
    try:
        foretold = costs(config)
    except nc.InfeasibleError:
        foretold = None
    try:
        step = nc.compress(task, config, epochs=0)
    except Exception:
        return {"outcome": "crash", "reason": traceback.format_exc()[-2000:]}
    result: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2)}
    if not step.metrics["feasible"]:
        return result | {"outcome": "infeasible", "reason": step.metrics["reason"], "foretold": foretold is None}
    assert foretold is not None
    assert step.run.candidate is not None
    params = sum(parameter.numel() for parameter in step.run.candidate.network.parameters())
    return result | {
        "outcome": "feasible",
        "params_error": foretold["params"] - params,
        "bytes_ratio": foretold["size_mb"] / step.metrics["size_mb"],
        "size_mb": step.metrics["size_mb"],
        "export_error": step.metrics["export_error"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("fuzz.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(arguments.seed)
    tasks = {kind: KINDS[kind]() for kind in arguments.kinds}
    costs = {kind: nc.CostModel(task) for kind, task in tasks.items()}
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for number in range(arguments.configs):
        kind = arguments.kinds[number % len(arguments.kinds)]
        extreme = number // len(arguments.kinds) % 2 == 1
        config = random_config(tasks[kind].spec, rng, extreme)
        if number < len(rows):
            continue
        row = {"kind": kind, "extreme": extreme, **carry_out(tasks[kind], costs[kind], config), "config": config}
        rows.append(row)
        print(number, kind, {key: value for key, value in row.items() if key not in ("config", "kind")}, flush=True)
        arguments.output.write_text(json.dumps(rows))
    print(json.dumps(summary(rows), indent=1))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        feasible = [row for row in own if row["outcome"] == "feasible"]
        ordinary = [row for row in own if not row["extreme"]]
        ratios = [abs(row["bytes_ratio"] - 1) for row in feasible]
        found[kind] = {
            "configs": len(own),
            "crashes": sum(row["outcome"] == "crash" for row in own),
            "infeasible": sum(row["outcome"] == "infeasible" for row in own),
            "infeasible, ordinary": sum(row["outcome"] == "infeasible" for row in ordinary) / max(1, len(ordinary)),
            "params wrong": sum(row["params_error"] != 0 for row in feasible),
            "largest error of bytes": max(ratios, default=0.0),
        }
    return found


if __name__ == "__main__":
    main()
