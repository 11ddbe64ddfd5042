"""Population-based training over compression against trials that start over, at equal epochs.

    python benchmarks/pbt.py --population 8 --epochs 6 --seeds 8 --out benchmarks/results
    python benchmarks/pbt.py --task transformer --sentences FOLDER --population 8 --epochs 6 --seeds 4 --out ...
    python benchmarks/pbt.py --task minilm --sentences FOLDER --population 8 --epochs 4 --seeds 2 --out ...

Both are given the same epochs, on the demo's digits, a small transformer or MiniLM: `restarts` are random configs,
each trained from the original's weights; `pbt` is a population of random configs, the same ones, of which losers go on
from winners' weights every `interval` reports. Each run is driven as Tune drives it (in one process, no workers), so
that the same seed gives the same front. The figure is the hypervolume of accuracy drop (up to 10 points, MiniLM 20)
and of how many times smaller the file is (in logarithm, up to 100) of what is there at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from small_tasks import digits_task, minilm_task, sentence_task

import ray_nascomp as nc
from ray_nascomp.pareto import hypervolume
from ray_nascomp.pipeline import CompressionRun
from ray_nascomp.plan import CONTINUE_FROM
from ray_nascomp.schedulers import CompressionPBTScheduler
from ray_nascomp.space import Space

LARGEST_DROP = {"digits": 0.1, "transformer": 0.1, "minilm": 0.2}


class Member:
    """A trial as the scheduler sees it, with its run in this process."""

    def __init__(self, name: str, config: dict[str, Any], folder: Path) -> None:
        self.trial_id, self.config, self.folder = name, config, folder
        self.status, self.last_result = Trial.PENDING, {}
        self.storage = SimpleNamespace(experiment_fs_path=str(folder), trial_dir_name=None)
        manager = SimpleNamespace(best_checkpoint_results=[], latest_checkpoint_result=None)
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)
        self.run: CompressionRun | None = None

    def set_config(self, config: dict[str, Any]) -> None:
        self.config, self.run = config, None

    def step(self, task: nc.Task, goal: nc.Goal, costs: nc.CostModel, epochs: int) -> dict[str, Any]:
        if self.run is None:
            self.run = CompressionRun(task, self.config, epochs, goal, costs)
            if CONTINUE_FROM in self.config:
                self.run.continue_from(self.folder / self.config[CONTINUE_FROM])
        return {**self.run.step().metrics, "training_iteration": self.last_result.get("training_iteration", 0) + 1}

    def save(self) -> None:
        assert self.run is not None
        path = self.folder / self.trial_id / f"checkpoint_{self.last_result['training_iteration']}"
        self.run.save(path)
        saved = SimpleNamespace(metrics=dict(self.last_result), checkpoint=SimpleNamespace(path=str(path)))
        self.run_metadata.checkpoint_manager.best_checkpoint_results.append(saved)


def search(
    task: nc.Task,
    goal: nc.Goal,
    costs: nc.CostModel,
    configs: list[dict[str, Any]],
    scheduler: TrialScheduler,
    epochs: int,
) -> list[dict[str, Any]]:
    """The last reports of all trials."""
    with tempfile.TemporaryDirectory() as folder:
        members = [Member(f"t{number}", config, Path(folder)) for number, config in enumerate(configs)]
        controller = SimpleNamespace(get_trials=lambda: [m for m in members if m.status != Trial.TERMINATED])
        for member in members:
            scheduler.on_trial_add(controller, member)
        while (member := scheduler.choose_trial_to_run(controller)) is not None:
            member.status = Trial.RUNNING
            while member.status == Trial.RUNNING:
                result = member.step(task, goal, costs, epochs)
                decision = scheduler.on_trial_result(controller, member, result)
                member.last_result = {**result, "trial_id": member.trial_id}
                if result["final"]:
                    member.status, member.run = Trial.TERMINATED, None
                elif decision == TrialScheduler.PAUSE:
                    member.save()
                    member.status = Trial.PAUSED
        return [member.last_result for member in members]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["digits", "transformer", "minilm"], default="digits")
    parser.add_argument("--sentences", type=Path, help="folder with rt-polarity.pos and rt-polarity.neg")
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--interval", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="folder for the raw output")
    arguments = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.task != "digits" and (arguments.sentences is None or not arguments.sentences.exists()):
        print(f"{arguments.task}: skipped, --sentences FOLDER does not name the sentences")
        return
    make_task = {"digits": lambda _: digits_task(), "transformer": sentence_task, "minilm": minilm_task}[arguments.task]
    task = make_task(arguments.sentences)
    limit = LARGEST_DROP[arguments.task]
    goal = nc.Goal(
        [nc.Objective("accuracy"), nc.Objective("size_mb", "min")], [nc.Constraint("accuracy_drop", "<=", limit)]
    )
    costs, domains = nc.CostModel(task), nc.compression_space(task)
    space = Space(domains)
    record: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(arguments).items() if k not in ("out", "sentences")},
        "runs": [],
    }
    for seed in range(arguments.seeds):
        rng = np.random.default_rng(seed)
        configs = [space.sample(rng) for _ in range(arguments.population)]
        makers = {
            "restarts": FIFOScheduler,
            "pbt": lambda seed=seed: CompressionPBTScheduler(
                goal, domains, arguments.interval, seed, max_t=arguments.epochs + 1
            ),
        }
        for name, make in makers.items():
            start = time.perf_counter()
            results = search(task, goal, costs, configs, make(), arguments.epochs)
            points = [[row["accuracy_drop"], row["size_ratio"]] for row in results if row["feasible"]]
            run = {"seed": seed, "scheduler": name, "points": points, "hypervolume": round(share(points, limit), 4)}
            record["runs"].append({**run, "seconds": round(time.perf_counter() - start)})
            print({key: value for key, value in record["runs"][-1].items() if key != "points"}, flush=True)
            (arguments.out / f"pbt_{arguments.task}.json").write_text(json.dumps(record) + "\n")


def share(points: list[list[float]], limit: float) -> float:
    """Hypervolume of (accuracy drop, times smaller) as a share of a box: -0.02 to `limit`, 1 to 100 in logarithm."""
    unit = [[(drop + 0.02) / (limit + 0.02), 1 - np.log(ratio) / np.log(100)] for drop, ratio in points]
    return hypervolume(np.maximum(np.array(unit).reshape(-1, 2), 0.0), np.ones(2))


if __name__ == "__main__":
    main()
