"""Every model space of NNI's hub: built through Tune, pruned, quantized, exported; written into the docs.

    python benchmarks/nni_spaces.py [SPACE ...]      # measures what results/ does not hold yet
    python benchmarks/nni_spaces.py --render         # docs/nni-spaces.md from the results alone

Architectures are drawn by Tune from the dimensions of `nni_space`. Each is built with random weights,
loses 30% of every group's channels, is quantized to 8 bits and exported; the file, run by ONNX
Runtime, is compared with NNI's simulation. Images are random, 32 x 32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.tune.search.variant_generator import generate_variants

import ray_nascomp as nc
from ray_nascomp.architecture import nni_space
from ray_nascomp.errors import UntraceableModelError
from ray_nascomp.space import Space

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "nni_spaces.json"
PAGE = ROOT / "docs" / "nni-spaces.md"
COUNT = 20
CELLS = {"width": 8, "num_cells": 4, "dataset": "cifar"}
SPACES: dict[str, dict[str, Any]] = {
    "NasBench101": {"stem_out_channels": 16, "num_stacks": 2, "num_modules_per_stack": 1},
    "NasBench201": {"stem_out_channels": 8, "num_modules_per_stack": 1},
    "DARTS": CELLS,
    "ENAS": CELLS,
    "PNAS": CELLS,
    "AmoebaNet": CELLS,
    "NASNet": CELLS,
    "MobileNetV3Space": {
        "num_labels": 10,
        "base_widths": (8, 8, 8, 16, 16, 24, 32),
        "squeeze_excite": ("none", "optional", "optional", "optional"),
        "depth_range": (1, 2),
        "stride": (1, 1, 2, 2, 2, 1, 1),
        "activation": ("hswish", "relu", "relu", "hswish", "hswish", "hswish", "hswish"),
    },
    "ShuffleNetSpace": {"num_labels": 10},
    "ProxylessNAS": {"num_labels": 10, "width_mult": 0.35},
    "AutoFormer": {"num_labels": 10, "img_size": 32, "patch_size": 8, "search_depth": (3, 4)},
}
STAGES = {"prune": {"method": "l1_norm", "sparsity": 0.3}, "quantize": {"method": "ptq", "bits": 8}}


def make(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nni.nas.hub.pytorch as hub
    return getattr(hub, name)(**SPACES[name])


def draw(architecture: dict[str, Any], seed: int) -> dict[str, Any]:
    """An architecture drawn by Tune."""
    space = {"architecture": architecture}
    _, config = next(iter(generate_variants(space, random_state=np.random.RandomState(seed))))
    return Space(space).canonical(config)["architecture"]


def make_task(build: Any, architecture: dict[str, Any]) -> tuple[nc.Task, int]:
    """A task with the first drawn architecture that can be traced, and that one's seed.

    Raises:
        UntraceableModelError: If none of ten can, or one takes too long.
    """
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 3, 32, 32, generator=generator), torch.arange(64) % 10
    for seed in range(1000, 1010):
        try:
            task = nc.Task(build(draw(architecture, seed)), data, data, build=build, architecture=architecture)
            if task.spec.prunable_names:
                return task, seed
        except nc.InfeasibleError:
            continue
        except UntraceableModelError as error:
            if "TimeoutError" in str(error):
                raise
    raise UntraceableModelError("none of ten architectures can be traced")


def measure(task: nc.Task, costs: nc.CostModel, architecture: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        whole = costs.of_plan(costs.plan({"architecture": architecture}))
    except nc.InfeasibleError as error:
        return {"infeasible": str(error)}
    traced = time.perf_counter() - start
    start = time.perf_counter()
    config = {"architecture": architecture, **STAGES}
    try:
        step = nc.compress(task, config, epochs=0)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    if not step.metrics["feasible"]:
        return {"infeasible": step.metrics["reason"]}
    network = step.run.candidate.network
    spec = step.run.candidate.spec
    return {
        "params": int(whole["params"]),
        "params after": sum(parameter.numel() for parameter in network.parameters()),
        "params told": int(costs(config)["params"]),
        "groups": len(spec.groups),
        "prunable": len(spec.prunable_groups),
        "MB": len(step.artifact.content) / 1e6,
        "MB told": costs(config)["size_mb"],
        "error": step.artifact.error,
        "structure, s": round(traced, 2),
        "all, s": round(time.perf_counter() - start, 2),
    }


def run(names: list[str], results: dict[str, Any], until: float) -> None:
    """Some architectures of every space before more of any."""
    prepared: dict[str, Any] = {}
    for seed in range(COUNT):
        for name in names:
            if str(seed) in results.get(name, {}).get("runs", {}) or time.monotonic() > until:
                continue
            if name in results and "reason" in results[name]:
                continue
            if name not in prepared:
                build, architecture = nni_space(make(name))
                entry = results.setdefault(name, {"dimensions": len(Space({"architecture": architecture})), "runs": {}})
                try:
                    task, entry["first"] = make_task(build, architecture)
                except UntraceableModelError as error:
                    entry["reason"] = str(error)
                    print(name, entry["reason"], flush=True)
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                    continue
                prepared[name] = task, nc.CostModel(task), architecture
            task, costs, architecture = prepared[name]
            results[name]["runs"][str(seed)] = result = measure(task, costs, draw(architecture, seed))
            print(name, seed, result, flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def render(results: dict[str, Any]) -> None:
    lines = [
        "| space | dimensions | built and exported | groups, prunable | params | after pruning | MB | largest error | "
        "structure, s | everything, s |",
        "| --- " * 10 + "|",
    ]
    reasons: list[str] = []
    for name in SPACES:
        if not (entry := results.get(name, {})).get("runs"):
            if "reason" in entry:
                reasons.append(f"| {name} | all | | {entry['reason']} |")
            continue
        runs = list(entry["runs"].values())
        good = [run for run in runs if "error" in run]

        def median(key: str, good: list[dict[str, Any]] = good) -> float:
            return statistics.median(run[key] for run in good)

        cells = [" "] * 7
        if good:
            cells = [
                f"{median('groups'):.0f}, {median('prunable'):.0f}",
                f"{median('params'):,.0f}",
                f"{median('params after'):,.0f}",
                f"{median('MB'):.2f}",
                f"{max(run['error'] for run in good):.1e}",
                f"{median('structure, s'):.1f}",
                f"{median('all, s'):.1f}",
            ]
        lines.append(f"| {name} | {entry['dimensions']} | {len(good)} of {len(runs)} | {' | '.join(cells)} |")
        for kind in ("infeasible", "failed"):
            found = [run[kind] for run in runs if kind in run]
            for reason in sorted(set(found)):
                reasons.append(f"| {name} | {kind} | {found.count(reason)} | {reason} |")
    table = ["| space | | times | reason |", "| --- | --- | --- | --- |", *reasons]
    PAGE.write_text(_PAGE.format(count=COUNT, table="\n".join(lines), reasons="\n".join(table)))


_PAGE = """# NNI's model spaces

Measured by `python benchmarks/nni_spaces.py`, which also writes this page; the raw figures are in
`benchmarks/results/nni_spaces.json`.

Architectures of every space in NNI's hub, up to {count} of each, drawn
by Tune from the dimensions of [`nni_space`](guides/architecture.md#nnis-model-spaces): built small, for images of
32 x 32, 30% of every group's channels removed, quantized to 8 bits, exported. The error is the largest relative
difference (L2) of a file's outputs, run by ONNX Runtime, from NNI's simulation; up to 0.1 is allowed, and more where
the rounding of activations itself changes the outputs by as much. Weights are random, not trained: deep networks of
this kind amplify any rounding. (ShuffleNet, of twenty blocks, turns a change of its inputs by 0.1% into one of its
outputs by 6%; ONNX Runtime's own static quantization of the same network is off by 0.92.) Other figures are medians: a
network's structure is traced once for its costs; the last column is everything from the config to the measured file, on
a busy machine.

{table}

What could not be built or exported:

{reasons}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spaces", nargs="*", metavar="SPACE")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after this time")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.render:
        run(arguments.spaces or list(SPACES), stored, until)
    render(stored)
