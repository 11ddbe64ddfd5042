"""What all case studies do, each step kept on disk: train a network, search its smaller forms, judge the best one.

A step whose result is there already is not done again, so that a study goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
import torch
from baseline import Split, augmented, joined, train
from case import Case, Splits
from ray import tune
from torch import nn

import ray_nascomp as nc
from ray_nascomp.pipeline.training import with_longer_training
from ray_nascomp.results import FrontReporter
from ray_nascomp.results.progress import tracked
from ray_nascomp.schedulers import ParetoASHAScheduler
from ray_nascomp.searchers import HybridSearch
from ray_nascomp.tasks.data import IGNORED


@dataclass(frozen=True)
class Whole:
    """The original.

    Attributes:
        content: Its ONNX file.
        metrics: What was measured of it, on validation data.
    """

    content: bytes
    metrics: Mapping[str, Any]


class Study:
    """One run of a case.

    Args:
        case: The case.
        data: Where its data are.
        output: Where the folders of all studies are; what this one finds goes into its own, by case and seed.
        seed: Seed of the original and of the search.
        cores: Trials at a time, and threads of the original's training and of the chosen models'.
        quick: Whether to spend little.
    """

    def __init__(self, case: Case, data: Path, output: Path, seed: int, cores: int = 1, quick: bool = False) -> None:
        self.case = case
        self.folder = output / (f"{case.name}_quick" if quick else case.name) / f"seed{seed}"
        self.seed = seed
        self.cores = cores
        self.budget = case.quick if quick else case.budget
        self._data = data
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def splits(self) -> Splits:
        """The data."""
        count = self.budget.samples
        splits = self.case.load(self._data)
        if self.case.cross_validates:
            splits = splits.fold(self.seed)
        return splits.first(count, count, count)

    @cached_property
    def original(self) -> nn.Module:
        """The trained original."""
        torch.set_num_threads(self.cores)
        torch.manual_seed(self.seed)
        network = self.case.build(dict(self.case.original))
        budget, case = self.budget, self.case
        train(
            network,
            self.splits.train,
            epochs=budget.epochs,
            learning_rate=budget.learning_rate,
            batch_size=case.batch_size,
            augment=case.augment if case.augments_original else None,
            seed=self.seed,
            checkpoint=self.folder / "original.pt",
        )
        torch.set_num_threads(1)
        return network

    @cached_property
    def start(self) -> nc.Task:
        """What the search starts from, with all training samples."""
        case, splits = self.case, self.splits
        if case.start is not None:
            return case.start(self.original, splits, self._data)
        inputs, targets = splits.train
        return nc.Task(
            self.original,
            splits.train,
            splits.val,
            test_data=splits.test,
            calibration_data=(inputs[:512], targets[:512]),
            build=case.build,
            architecture=case.architecture,
            batch_size=case.batch_size,
        )

    @cached_property
    def task(self) -> nc.Task:
        """What trials work on."""
        return self._task(self.budget.trial_samples, self.budget.copies)

    @cached_property
    def final_task(self) -> nc.Task:
        """What the chosen models are trained on."""
        task = self._task(None, self.budget.final_copies)
        count = self.budget.unlabelled
        if self.case.unlabelled is None or not count:
            return task
        data = task.train_data
        further = self.case.unlabelled(count), torch.full((count,), IGNORED)
        return task.with_changes(train_data=joined([data.head(len(data)), further]))

    def _task(self, samples: int | None, copies: int) -> nc.Task:
        data = self.start.train_data
        few = data.head(min(samples or len(data), len(data)))
        return self.start.with_changes(train_data=augmented(few, copies, self.case.augment, self.seed))

    @cached_property
    def whole(self) -> Whole:
        """The original as a file."""
        step = nc.compress(self.start.original or self.start, {}, epochs=0)
        assert step.artifact is not None
        return Whole(step.artifact.content, step.metrics)

    @property
    def test(self) -> Split:
        """The test samples as the searched task takes them."""
        data = self.start.test_data
        assert data is not None
        return data.head(len(data))

    @cached_property
    def goal(self) -> nc.Goal:
        """What is wanted of the outputs, speed and bytes, within the limits."""
        limits = self.budget.limits
        params = sum(parameter.numel() for parameter in self.original.parameters())
        return nc.Goal(
            objectives=[self.case.quality, nc.Objective("speedup"), nc.Objective("size_mb", mode="min")],
            constraints=[
                nc.Constraint("params", "<=", limits.params * params),
                nc.Constraint("size_ratio", ">=", 1 / limits.size),
                nc.Constraint("speedup", ">=", limits.speedup),
                nc.Constraint("accuracy_drop", "<=", limits.drop),
            ],
        )

    @cached_property
    def space(self) -> dict[str, Any]:
        """Architecture, what is removed, rank, bits, distillation."""
        if self.case.space is not None:
            return self.case.space(self.task)
        space = nc.compression_space(self.task, bits="layer", bit_choices=(4, 8))
        ranks = dict.fromkeys(self.task.spec.factorisable_names, tune.choice([0.25, 0.5, 1.0]))
        return {**space, "low_rank": {"rank": ranks, "round_to": 8}}

    @cached_property
    def first(self) -> list[dict[str, Any]]:
        """Configs that all searches begin with."""
        return [] if self.case.first is None else self.case.first(self.task)

    def tuner(self, name: str, searcher: Any, space: Mapping[str, Any], trials: int) -> tune.Tuner:
        """A search in its own folder; one that was stopped goes on.

        Args:
            name: The folder's name.
            searcher: Function without arguments that makes the searcher.
            space: What to search.
            trials: Number of trials.
        """
        epochs = self.budget.trial_epochs
        trainable = nc.compression_trainable(self.task, self.goal, epochs=epochs)
        if (self.folder / name / "tuner.pkl").exists():
            return nc.restore(str(self.folder / name), trainable, param_space=space, restart_errored=True)
        return tune.Tuner(
            trainable,
            param_space=dict(space),
            tune_config=tune.TuneConfig(
                search_alg=searcher(),
                scheduler=ParetoASHAScheduler(self.goal, max_t=epochs + 1),
                num_samples=trials,
                max_concurrent_trials=self.cores,
                time_budget_s=None if self.budget.minutes is None else 2 * 60 * self.budget.minutes / self.cores,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name=name, storage_path=str(self.folder.resolve()), callbacks=[FrontReporter(self.goal)], verbose=0
            ),
        )

    def searcher(self) -> HybridSearch:
        """Evolution and Bayesian optimisation with shared results."""
        return HybridSearch(self.goal, nc.CostModel(self.task), seed=self.seed, points_to_evaluate=self.first or None)

    def joint_search(self) -> nc.Results:
        """The search of all at once."""
        return self.search("search", self.searcher, self.space, self.budget.trials)

    def search(self, name: str, searcher: Callable[[], Any], space: Mapping[str, Any], trials: int) -> nc.Results:
        """A search to its end; one that is done already is read.

        Args:
            name: The name of its folder.
            searcher: Function without arguments that makes the searcher.
            space: What to search.
            trials: Number of trials.
        """
        if not self.is_searched(name):
            self.run(self.tuner(name, searcher, space, trials))
            nc.Results(self.folder / name, self.goal).retime(self.task)
            self._mark(name).touch()
        return nc.Results(self.folder / name, self.goal)

    def is_searched(self, name: str) -> bool:
        """Whether a search is done."""
        return self._mark(name).exists()

    def _mark(self, name: str) -> Path:
        return self.folder / f"{name}.done"

    def run(self, tuner: tune.Tuner) -> None:
        """Runs a search to its end."""
        ray.init(
            address="local",
            num_cpus=self.cores,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
        )
        try:
            tuner.fit()
        finally:
            ray.shutdown()

    def finish(self, config: Mapping[str, Any], name: str, *, is_taught: bool = True) -> dict[str, Any]:
        """Trains a config to its end.

        Args:
            config: The config.
            name: Name of the folder that gets model.onnx, the network and what was measured.
            is_taught: Whether a teacher tells what samples are that were made up or have no class. Without one they
                are left out, and the true ones are seen three times as often as the original has seen them.

        Returns:
            What was measured, on validation data.
        """
        folder = self.folder / name
        record = folder / "metrics.json"
        if not record.exists():
            torch.set_num_threads(self.cores)
            if is_taught or self.case.augments_original:
                task, epochs = self.final_task, self.budget.final_epochs
            else:
                task, epochs = self.start, 3 * self.budget.epochs
            start = partial(nc.compress_steps, task, config, epochs, self.goal)
            *_, last = tracked(start, epochs + 1, task.metric)
            torch.set_num_threads(1)
            last.save(folder)
            record.write_text(json.dumps(last.metrics, default=str))
        return json.loads(record.read_text())

    def keep(self, name: str, content: bytes) -> None:
        """Keeps a model's file under the name that it has in the table."""
        path = self._file(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    def kept(self, name: str) -> bytes:
        """The file of a model that was kept."""
        return self._file(name).read_bytes()

    def _file(self, name: str) -> Path:
        return self.folder / "models" / f"{''.join(c if c.isalnum() else '_' for c in name)}.onnx"

    def choose(self, results: nc.Results, prefix: str = "final") -> tuple[str, dict[str, Any]]:
        """The preferred one of a search's best results after their training to the end, at a rate for its length.

        Args:
            results: The search's results.
            prefix: What the folders of the trained models begin with.

        Returns:
            The folder's name, and what was measured on validation data.
        """
        front = self.best_of(results, self.budget.variants)
        samples = self.budget.final_epochs * len(self.final_task.train_data)
        longer = samples / (self.budget.trial_epochs * len(self.task.train_data))
        finished = {
            trial.trial_id: self.finish(with_longer_training(trial.config, longer), f"{prefix}_{trial.trial_id}")
            for trial in front
        }
        best = preferred(self.goal, finished, self.budget.limits.equal)
        return f"{prefix}_{best}", finished[best]

    def best_of(self, results: nc.Results, count: int) -> list[Any]:
        """The best completed trials within the limits, then those least beyond them; of equals the smaller."""
        goal = self.goal

        completed = [trial for trial in results.trials if trial.status == "completed"]
        if not completed:
            raise SystemExit(f"no trial was completed: {results}; what became of each is in {self.folder}")
        completed.sort(
            key=lambda trial: (goal.violation(trial.metrics), goal.losses(trial.metrics)[0], -gain(trial.metrics))
        )
        return completed[:count]


def gain(metrics: Mapping[str, Any]) -> float:
    """How many times smaller a model is, times how many times faster."""
    return float(metrics["size_ratio"] * metrics["speedup"])


def preferred(goal: nc.Goal, results: Mapping[str, Mapping[str, Any]], equal: float) -> str:
    """The smallest and fastest of the results that are as accurate as the best one.

    Args:
        goal: Results within its limits go before others; beyond them those with the least violation.
        results: Name -> metrics, one or more.
        equal: So much accuracy tells no two apart.
    """
    least = min(map(goal.violation, results.values()))
    allowed = {name: metrics for name, metrics in results.items() if goal.violation(metrics) <= least}
    enough = max(metrics["accuracy"] for metrics in allowed.values()) - equal - 1e-9
    return max(
        (name for name, metrics in allowed.items() if metrics["accuracy"] >= enough),
        key=lambda name: gain(allowed[name]),
    )
