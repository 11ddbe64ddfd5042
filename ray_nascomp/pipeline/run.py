"""One config carried out step by step: compress, train, export, with a report after each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ray_nascomp.compression.batch_norm import reestimate_batch_norm
from ray_nascomp.costs import CostModel
from ray_nascomp.errors import ConfigError, InfeasibleError
from ray_nascomp.goals import Goal
from ray_nascomp.nni_adapter.output_forms import OutputForm
from ray_nascomp.pipeline import measure
from ray_nascomp.pipeline.candidate import Candidate, make_candidate
from ray_nascomp.pipeline.memory import return_freed_memory
from ray_nascomp.pipeline.memory_format import is_faster_channels_last
from ray_nascomp.pipeline.prepare import Prepared, prepare, prepare_for_training, training_session
from ray_nascomp.pipeline.recipe import Recipe
from ray_nascomp.pipeline.report import Measurement, infeasible_metrics, metrics_of
from ray_nascomp.pipeline.reuse import KeptFile, Reuse
from ray_nascomp.pipeline.snapshot import Snapshot
from ray_nascomp.pipeline.training import OnProgress, Trainer, unseen
from ray_nascomp.plan import CompressionPlan
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
        reuse: The stage cache, where there is one.

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
        reuse: Reuse | None = None,
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
        self.outputs: dict[str, OutputForm] = {}
        self._first: measure.Artifact | None = None
        self.is_continued = False
        self._infeasible = False
        self._refused: str | None = None
        self.reuse = reuse
        self.on_progress: OnProgress = unseen

    @cached_property
    def recipe(self) -> Recipe:
        """What the stages are made from.

        Raises:
            InfeasibleError: If the plan cannot be carried out.
        """
        return Recipe(self.task, self.plan, self.costs, max(1, self.epochs))

    @cached_property
    def trainer(self) -> Trainer:
        """What trains the candidate.

        Raises:
            InfeasibleError: If the plan cannot be carried out.
        """
        macs, whole = (self.costs.of_plan(plan)["macs"] for plan in (self.plan, CompressionPlan()))
        trainer = Trainer(self.task, self.plan.finetune, max(1, self.epochs), self.recipe.training_seed, macs, whole)
        trainer.on_progress = self.on_progress
        return trainer

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
            if self._refused is not None:
                raise InfeasibleError(self._refused)
            measurement = self._compress() if self.candidate is None else self._train()
            self.metrics = metrics_of(self, measurement)
        except InfeasibleError as error:
            self._infeasible = True
            self.artifact = None
            self.metrics = infeasible_metrics(self, str(error))
        self.steps_done += 1
        return Step(self.metrics, self.artifact, self)

    def _compress(self) -> Measurement:
        return_freed_memory()
        with self._clock("prune"):
            self.candidate = self._compressed()
            self.trainer.masks = self.candidate.masks
        simulated, self._first = self._export(self.recipe.ready())
        self.artifact = self._first
        if self.epochs == 0:
            return Measurement(self._first.quality, "exported", self._first)
        return Measurement(simulated, "compressed", self._first)

    def _compressed(self) -> Candidate:
        known = self.reuse.ready(self.task, self.plan, self.recipe) if self.reuse is not None else None
        if known is not None:
            return known
        candidate = make_candidate(self.task, self.plan, self.costs, self.trainer, self.reuse)
        if candidate.is_changed:
            reestimate_batch_norm(candidate.network, self.task.calibration_batches())
            if self.reuse is not None:
                self.reuse.keep_candidate(self.recipe.ready(), self.task, candidate, self.costs.ranks(self.plan))
        return candidate

    def _train(self) -> Measurement:
        assert self.candidate is not None
        self.artifact = None
        epoch = self.steps_done - 1
        quantized = self._trains_quantized(epoch)
        text = self.recipe.trained(epoch + 1, quantized)
        with self._clock("finetune"):
            known = self.reuse.trained(text, self.task) if self.reuse is not None else None
            simulation = self._take(known) if known is not None else self._train_epoch(epoch, quantized, text)
        if self.steps_done == self.epochs:
            _, self.artifact = self._export(text, simulation)
            return Measurement(self.artifact.quality, "exported", self.artifact)
        if simulation is None:
            with self._clock("quantize"):
                prepared = self._prepared(text)
                simulation = measure.simulate(prepared, self.task, self.outputs)
        assert self._first is not None
        return Measurement(simulation.quality, "finetuned", self._first)

    def _train_epoch(self, epoch: int, quantized: bool, text: str) -> measure.Simulation | None:
        """An epoch; returns the network under simulated integers where it was trained with them."""
        assert self.candidate is not None
        network, simulation = self.candidate.network, None
        self.trainer.is_channels_last = is_faster_channels_last(network, self.task)
        if quantized:
            simulation = self._train_quantized(epoch)
        else:
            self.optimizer = self.optimizer or self.trainer.make_optimizer(network)
            self.trainer.epoch(network, self.optimizer, epoch)
        if self.reuse is not None:
            optimizer = self.optimizer if epoch + 1 < self.epochs else None  # Two thirds of the bytes.
            snapshot = Snapshot.of(self.candidate, self.costs.ranks(self.plan), self.trainer, optimizer)
            if simulation is not None:
                snapshot.tensors["simulated"] = simulation.outputs
                snapshot.facts["simulated"] = vars(simulation.quality)
            self.reuse.keep(text, self.task, snapshot)
        return simulation

    def _take(self, snapshot: Snapshot) -> measure.Simulation | None:
        """Takes up the state after an epoch, as `_train_epoch` leaves it."""
        assert self.candidate is not None
        snapshot.load_into(self.candidate, self.task)
        self.trainer.masks = self.candidate.masks
        self.optimizer = snapshot.optimizer(self.trainer, self.candidate.network)
        if "simulated" not in snapshot.facts:
            return None
        return measure.Simulation(
            measure.Quality(**snapshot.facts["simulated"]), snapshot.tensors["simulated"], self.candidate.calibration
        )

    def _train_quantized(self, epoch: int) -> measure.Simulation:
        """An epoch of quantization-aware training; the network is prepared for it before the first."""
        assert self.candidate is not None
        prepare_for_training(self.candidate, self.task)
        session = training_session(
            self.candidate,
            self.task,
            self.outputs,
            lambda model, optimizer, step: self.trainer.epoch(model, optimizer, epoch, step),
            self.trainer.optimizer_settings,
            self.trainer.loss,
        )
        try:
            session.train_epoch()
            simulation = measure.simulation_of(session, self.candidate.network, self.task)
        finally:
            session.close()
        self.candidate.calibration = simulation.calibration
        return simulation

    def _export(
        self, text: str, simulation: measure.Simulation | None = None
    ) -> tuple[measure.Quality, measure.Artifact]:
        """What the network is worth under simulated integers, and the exported file.

        Args:
            text: What the network is made from.
            simulation: The network under simulated integers, where it is known.
        """
        assert self.candidate is not None
        file_text = self.recipe.exported(text)
        known = self.reuse.file(file_text, self.task) if self.reuse is not None else None
        if known is not None:
            self.outputs = known.outputs
            with self._clock("measure"):
                return known.simulated, measure.timed(known.content, known.quality, known.error, self.task)
        with self._clock("quantize"):
            prepared = self._prepared(text)
        with self._clock("export"):
            proto = prepared.export(self.task)
            self.outputs = prepared.outputs_to_quantize(proto)
        if simulation is None:
            with self._clock("quantize"):
                simulation = measure.simulate(prepared, self.task, self.outputs)
        with self._clock("measure"):
            artifact = measure.make_artifact(prepared, proto, simulation, self.task)
        if self.reuse is not None:
            file = KeptFile(artifact.content, artifact.quality, artifact.error, simulation.quality, self.outputs)
            self.reuse.keep_file(file_text, self.task, file)
        return simulation.quality, artifact

    def _prepared(self, text: str) -> Prepared:
        """The candidate ready for integers; `text` is what its network is made from."""
        assert self.candidate is not None
        if self.reuse is None or self.plan.quantize.method != "ptq":
            return prepare(self.candidate, self.task)
        with self.reuse.roundings(self.recipe.rounded(text, self.candidate.bits), self.task) as known:
            return prepare(self.candidate, self.task, known)

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

    def continue_from(self, folder: str | Path) -> None:
        """Starts from the weights of another config's saved run, whose structure contains this one's.

        Each group lacks no more units there than the plan removes, each rank is no lower, the
        architecture is the same. What goes further is decided on the other's weights. The run
        goes on at the step at which the other was saved; bytes and latency are measured anew.

        Args:
            folder: What `save` has written for a run on the same task.

        Raises:
            ConfigError: If the folder is no such run, or its structure does not contain this one's.
            RuntimeError: If this run has taken a step.
        """
        from ray_nascomp.pipeline.continuing import continue_run

        if self.steps_done:
            raise RuntimeError("the run has begun: a fresh one can continue from another")
        self.forget_recipe()
        try:
            with self._clock("prune"):
                continue_run(self, Path(folder))
            assert self.candidate is not None
            self.trainer.masks = self.candidate.masks
            _, self._first = self._export("")
        except InfeasibleError as error:
            self._refused = str(error)

    def forget_recipe(self) -> None:
        """Leaves the stage cache alone, which knows nothing of weights that come from elsewhere."""
        self.is_continued = True
        self.reuse = None


def compress_steps(
    task: Task,
    config: Mapping[str, Any],
    epochs: int = 8,
    goal: Goal | None = None,
    on_progress: OnProgress = unseen,
) -> Iterator[Step]:
    """Carries out a config and yields after every step, for a loop that reports `step.metrics`.

    Args:
        task: The task.
        config: A config; keys outside the stages are ignored.
        epochs: Epochs of fine-tuning; there are `epochs + 1` steps.
        goal: What `score` is made from; the task's metric alone if absent.
        on_progress: Function ("training", epochs that are done, a fraction), called before each batch of fine-tuning;
            before that ("pruning", share that is done) while scheduled pruning trains, and where a teacher is asked
            about all samples once, ("teacher", share that it has read).

    Raises:
        ConfigError: If the config is not valid.
    """
    run = CompressionRun(task, config, epochs, goal)
    run.on_progress = on_progress
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
