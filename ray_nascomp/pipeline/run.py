"""One config carried out step by step: compress, train, export, with a report after each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ray_nascomp.compression.batch_norm import reestimate_batch_norm
from ray_nascomp.costs import CostModel
from ray_nascomp.errors import ConfigError, InfeasibleError
from ray_nascomp.goals import Goal
from ray_nascomp.pipeline import measure
from ray_nascomp.pipeline.candidate import Candidate, make_candidate
from ray_nascomp.pipeline.prepare import prepare, prepare_for_training, training_session
from ray_nascomp.pipeline.report import Measurement, infeasible_metrics, metrics_of
from ray_nascomp.pipeline.training import Trainer
from ray_nascomp.tasks.base import Task


@dataclass(frozen=True)
class Step:
    """What one step reports.

    Attributes:
        metrics: The report: the same keys after every step.
        artifact: The exported file; after the last step only, and after the first.
        run: The run, to be saved or looked into.
    """

    metrics: dict[str, Any]
    artifact: measure.Artifact | None
    run: CompressionRun

    def save(self, folder: str | Path) -> None:
        """Writes model.onnx (where there is one), model.safetensors and manifest.json into a folder."""
        self.run.save(folder)


class CompressionRun:
    """A config on its way: `step` until `is_done`.

    Step 1 is the compressed model before training; then comes one step an epoch; the last one
    reports the exported file.

    Args:
        task: The task.
        config: A config; keys outside the stages are ignored.
        epochs: Epochs of fine-tuning, 0 or more.
        goal: What `score` is made from; the task's metric alone if absent.
        costs: The task's cost model, where one is at hand.

    Raises:
        ConfigError: If the config is not valid.
    """

    def __init__(
        self,
        task: Task,
        config: Mapping[str, Any],
        epochs: int,
        goal: Goal | None = None,
        costs: CostModel | None = None,
    ) -> None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
            raise ConfigError(f"epochs: {epochs!r} was given, a whole number of 0 or more is allowed")
        self.task = task
        self.config = dict(config)
        self.epochs = epochs
        self.goal = goal
        self.costs = costs or CostModel(task)
        self.plan = self.costs.plan(config)
        self.steps_done = 0
        self.seconds: dict[str, float] = {}
        self.metrics: dict[str, Any] = {}
        self.artifact: measure.Artifact | None = None
        self.candidate: Candidate | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.outputs: set[str] = set()
        self._first: measure.Artifact | None = None
        self._infeasible = False
        self._trainer = Trainer(task, self.plan.finetune, max(1, epochs), self.plan.seed)

    @property
    def is_done(self) -> bool:
        """Whether the last step has been taken."""
        return self._infeasible or self.steps_done > self.epochs

    def step(self) -> Step:
        """Takes the next step.

        An infeasible plan gives one last step, with `feasible: False` and the reason.

        Raises:
            RuntimeError: If the run is done.
        """
        if self.is_done:
            raise RuntimeError("the run is done: it has no further step")
        try:
            measurement = self._compress() if self.candidate is None else self._train()
            self.metrics = metrics_of(self, measurement)
        except InfeasibleError as error:
            self._infeasible = True
            self.artifact = None
            self.metrics = infeasible_metrics(self, str(error))
        self.steps_done += 1
        return Step(self.metrics, self.artifact, self)

    def _compress(self) -> Measurement:
        with self._clock("prune"):
            self.candidate = candidate = make_candidate(self.task, self.plan, self.costs, self._trainer)
            if candidate.is_changed:
                reestimate_batch_norm(candidate.network, self.task.calibration_batches())
            self._trainer.masks = candidate.masks
        simulation, self._first = self._export()
        self.artifact = self._first
        if self.epochs == 0:
            return Measurement(self._first.value, "exported", self._first)
        return Measurement(simulation.value, "compressed", self._first)

    def _train(self) -> Measurement:
        assert self.candidate is not None
        self.artifact = None
        epoch = self.steps_done - 1
        simulation = None
        with self._clock("finetune"):
            if self._trains_quantized(epoch):
                simulation = self._train_quantized(epoch)
            else:
                network = self.candidate.network
                self.optimizer = self.optimizer or self._trainer.make_optimizer(network)
                self._trainer.epoch(network, self.optimizer, epoch)
        if self.steps_done == self.epochs:
            _, self.artifact = self._export(simulation)
            return Measurement(self.artifact.value, "exported", self.artifact)
        if simulation is None:
            with self._clock("quantize"):
                prepared = prepare(self.candidate, self.task)
                simulation = measure.simulate(prepared, self.task, self.outputs)
        assert self._first is not None
        return Measurement(simulation.value, "finetuned", self._first)

    def _train_quantized(self, epoch: int) -> measure.Simulation:
        """An epoch of quantization-aware training; the network is prepared for it before the first."""
        assert self.candidate is not None
        prepare_for_training(self.candidate, self.task)
        session = training_session(
            self.candidate,
            self.task,
            self.outputs,
            lambda model, optimizer, step: self._trainer.epoch(model, optimizer, epoch, step),
            self._trainer.optimizer_settings,
            self._trainer.loss,
        )
        try:
            session.train_epoch()
            simulation = measure.simulation_of(session, self.candidate.network, self.task)
        finally:
            session.close()
        self.candidate.calibration = simulation.calibration
        return simulation

    def _export(self, simulation: measure.Simulation | None = None) -> tuple[measure.Simulation, measure.Artifact]:
        """The network under simulated integers, and the exported file."""
        assert self.candidate is not None
        with self._clock("quantize"):
            prepared = prepare(self.candidate, self.task)
        with self._clock("export"):
            proto = prepared.export(self.task)
            self.outputs = prepared.outputs_to_quantize(proto)
        if simulation is None:
            with self._clock("quantize"):
                simulation = measure.simulate(prepared, self.task, self.outputs)
        with self._clock("measure"):
            artifact = measure.make_artifact(prepared, proto, simulation, self.task)
        return simulation, artifact

    def _trains_quantized(self, epoch: int) -> bool:
        """Whether an epoch is one of quantization-aware training: the last quarter, at least one."""
        assert self.candidate is not None
        if not self.plan.quantize.trains or not self.candidate.bits:
            return False
        return epoch >= min(self.epochs - 1, round(self.epochs * self.plan.quantize.start))

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def save(self, folder: str | Path) -> None:
        """Writes model.onnx (where there is one), model.safetensors and manifest.json into a folder."""
        from ray_nascomp.pipeline.checkpoint import save_run

        save_run(self, Path(folder))

    def restore(self, folder: str | Path) -> None:
        """Goes on from what `save` has written."""
        from ray_nascomp.pipeline.checkpoint import restore_run

        restore_run(self, Path(folder))


def compress_steps(task: Task, config: Mapping[str, Any], epochs: int = 8, goal: Goal | None = None) -> Iterator[Step]:
    """Carries out a config and yields after every step, for a loop that reports `step.metrics`.

    Args:
        task: The task.
        config: A config; keys outside the stages are ignored.
        epochs: Epochs of fine-tuning; there are `epochs + 1` steps.
        goal: What `score` is made from; the task's metric alone if absent.

    Raises:
        ConfigError: If the config is not valid.
    """
    run = CompressionRun(task, config, epochs, goal)
    while not run.is_done:
        yield run.step()


def compress(task: Task, config: Mapping[str, Any], epochs: int = 8, goal: Goal | None = None) -> Step:
    """Carries out a config in one go; the last of `compress_steps`.

    Args:
        task: The task.
        config: A config; keys outside the stages are ignored.
        epochs: Epochs of fine-tuning.
        goal: What `score` is made from; the task's metric alone if absent.

    Raises:
        ConfigError: If the config is not valid.
    """
    *_, last = compress_steps(task, config, epochs, goal)
    return last
