"""The chosen model: exported, judged on the test set, trained to the end."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal, Objective
from ray_nascomp.results.loading import TrialRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from torch import nn

    from ray_nascomp.tasks.base import Task
    from ray_nascomp.tasks.data import Data

logger = logging.getLogger(__name__)

_MODEL_FILE = "model.onnx"
_MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class SelectedModel:
    """One trial's model.

    Attributes:
        trial_id: Tune's id of the trial.
        config: What it was made from.
        metrics: What was measured of it.
        goal: What the search was after.
        folder: A local or remote folder with model.onnx, model.safetensors and manifest.json.
        filesystem: Where the folder lies.
    """

    trial_id: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    goal: Goal
    folder: str | None
    filesystem: pyarrow.fs.FileSystem

    @classmethod
    def from_trial(cls, trial: TrialRecord, goal: Goal, filesystem: pyarrow.fs.FileSystem) -> SelectedModel:
        """The model of a finished trial."""
        return cls(trial.trial_id, trial.config, trial.metrics, goal, trial.checkpoint, filesystem)

    def export(self, path: str | Path) -> Path:
        """Copies the measured files.

        Args:
            path: A path that ends in ".onnx" gets the ONNX file, any other becomes a folder with
                model.onnx, model.safetensors and manifest.json.

        Returns:
            The path.

        Raises:
            ConfigError: If the trial kept no file.
        """
        target = Path(path)
        if target.suffix == ".onnx":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.content())
            return target
        self.content()
        target.mkdir(parents=True, exist_ok=True)
        assert self.folder is not None
        pyarrow.fs.copy_files(self.folder, str(target.resolve()), source_filesystem=self.filesystem)
        return target

    @property
    def has_file(self) -> bool:
        """Whether the trial kept an ONNX file."""
        if self.folder is None:
            return False
        (entry,) = self.filesystem.get_file_info([f"{self.folder}/{_MODEL_FILE}"])
        return bool(entry.type is pyarrow.fs.FileType.File)

    def content(self) -> bytes:
        """The ONNX file's bytes.

        Raises:
            ConfigError: If the trial kept no file.
        """
        if self.folder is None:
            raise ConfigError(
                f"trial {self.trial_id} has no checkpoint, so there is no file; was checkpoint_at_end switched off?"
            )
        path = f"{self.folder}/{_MODEL_FILE}"
        try:
            with self.filesystem.open_input_stream(path) as stream:
                return stream.read()
        except FileNotFoundError as error:
            raise ConfigError(f"trial {self.trial_id} was stopped before it exported a file: {path}") from error

    def evaluate(
        self, test_data: Any = None, *, task: Task | None = None, batch_sizes: Sequence[int] = (1, 32), threads: int = 1
    ) -> dict[str, float]:
        """Judges the exported file on the test set, next to the original's file.

        Args:
            test_data: Samples that the search never saw; the task's own `test_data` if absent.
            task: The task; found by itself if it is alive in this process.
            batch_sizes: Batch sizes at which both files are timed.
            threads: Threads of ONNX Runtime.

        Returns:
            The metric of the compressed and of the original file, the drop, sizes in megabytes
            and their ratio, and for each batch size the milliseconds and the speedup.

        Raises:
            ConfigError: If there is no test data, no task, or no file; or if the task's original reads its
                samples otherwise and has no test data of its own.
        """
        from ray_nascomp.deployment.runtime import compare_latency, make_session, session_predictor
        from ray_nascomp.pipeline.measure import baseline_of
        from ray_nascomp.tasks.data import Data

        task = self._task(task)
        data = test_data if isinstance(test_data, Data) or test_data is None else Data(test_data, "test_data")
        data = data or task.test_data
        if data is None:
            raise ConfigError("test_data: none was given and the task has none")
        content, baseline = self.content(), baseline_of(task)
        compressed, original = (make_session(c, threads) for c in (content, baseline.content))
        value = task.evaluate(session_predictor(compressed, task.input_names), data)
        whole, known = task.original or task, _as_the_original_reads_it(task, data, test_data is None)
        reference = task.evaluate(session_predictor(original, whole.input_names), known)
        report = {
            task.metric: value,
            f"{task.metric}_original": reference,
            f"{task.metric}_drop": task.drop(value, reference),
            "size_mb": len(content) / 1e6,
            "size_mb_original": len(baseline.content) / 1e6,
            "size_ratio": len(baseline.content) / len(content),
        }
        for size in batch_sizes:
            inputs, its = data.head(size)[0], (known.head(size)[0], whole.input_names)
            latency = compare_latency(original, compressed, inputs, task.input_names, original_sample=its)
            report[f"latency_ms_batch_{size}"] = latency.compressed_ms
            report[f"latency_ms_original_batch_{size}"] = latency.original_ms
            report[f"speedup_batch_{size}"] = latency.speedup
        return report

    def refine(
        self,
        epochs: int,
        *,
        train_data: Any = None,
        task: Task | None = None,
        folder: str | Path | None = None,
        progress: bool = True,
    ) -> SelectedModel:
        """Trains the chosen plan to the end, with a longer training than the search could afford.

        The plan starts again from the task's own weights, with the learning rate that suits the longer
        training (Bjorck et al. 2024, arXiv 2409.19913: it falls with the power 0.32 of the length). If
        the result breaks the goal's constraints where the trial's model did not, or if it is worse by
        the goal's first objective that tells quality (the task's metric, its drop or the divergence; the
        metric where there is none), the trial's model is returned.

        Args:
            epochs: Epochs of the training, 1 or more.
            train_data: Samples to train on, such as further ones without a label (class -100), in the forms that
                `Task` takes; the task's own if absent. More samples an epoch are a longer training, too.
            task: The task; found by itself if it is alive in this process.
            folder: Where the files go; a temporary folder if absent.
            progress: Whether epochs and quality are shown on stderr.

        Raises:
            ConfigError: If there is no task, or `epochs` or the data are not allowed.
        """
        from ray_nascomp.pipeline import compress_steps
        from ray_nascomp.pipeline.training import with_longer_training
        from ray_nascomp.results.progress import tracked

        if epochs < 1:
            raise ConfigError(f"epochs: {epochs!r} was given, 1 or more is allowed")
        task = self._task(task)
        target = Path(folder or tempfile.mkdtemp(prefix="ray-nascomp-refined-"))
        # One that was stopped early had the learning rate of the epochs that it was meant to have.
        manifest = _manifest_of(self.folder, self.filesystem)
        planned = manifest.get("epochs") or self.metrics.get("epoch")
        seen = manifest.get("train_samples") or len(task.train_data)
        if train_data is not None:
            task = task.trained_on(train_data)
        times = epochs * len(task.train_data) / ((planned or epochs) * seen)
        config = with_longer_training(self.config, times)
        start = partial(compress_steps, task, config, epochs, self.goal)
        *_, step = tracked(start, epochs + 1, task.metric) if progress else start()
        if self.metrics.get("final") and self._is_better(step.metrics, task):
            return self
        step.save(target)
        return SelectedModel(self.trial_id, config, step.metrics, self.goal, str(target), pyarrow.fs.LocalFileSystem())

    def network(self, *, task: Task | None = None) -> nn.Module:
        """The compressed network as a torch module, on the CPU in evaluation mode.

        Where layers are quantized it holds the weights in floating point; the integers are in the
        exported file.

        Args:
            task: The task; found by itself if it is alive in this process.

        Raises:
            ConfigError: If there is no task, or the trial kept no file.
        """
        from ray_nascomp.pipeline import CompressionRun

        task = self._task(task)
        with tempfile.TemporaryDirectory() as folder:
            self.export(folder)
            manifest = json.loads((Path(folder) / _MANIFEST_FILE).read_text())
            run = CompressionRun(task, self.config, manifest["epochs"], self.goal)
            run.restore(folder)
        if run.candidate is None:
            raise ConfigError(f"trial {self.trial_id} kept no network: {self.metrics.get('reason')}")
        return run.candidate.network.cpu().eval()

    def layers(self) -> list[dict[str, Any]]:
        """The layers before and after, as in `Results.layers`."""
        return layers_of(self.folder, self.filesystem)

    def plot_layers(self) -> go.Figure:
        """Parameters, multiply-accumulates and bytes of each layer before and after, as a Plotly figure."""
        from ray_nascomp.results.plots import layers_figure

        return layers_figure(self.layers())

    def _is_better(self, refined: Mapping[str, Any], task: Task) -> bool:
        if self.goal.is_feasible(self.metrics) and not self.goal.is_feasible(refined):
            logger.warning("the trial's model is kept: the longer training broke the goal's constraints")
            return True
        wanted = self._quality_wanted(task)
        known, found = (float(metrics[wanted.metric]) for metrics in (self.metrics, refined))
        if found * wanted.sign > known * wanted.sign:
            logger.warning("the trial's model is kept: %s %.4g, %.4g after the training", wanted.metric, known, found)
            return True
        return False

    def _quality_wanted(self, task: Task) -> Objective:
        """The goal's first objective that tells a model's quality; the task's metric where it has none."""
        qualities = (task.metric, f"{task.metric}_drop", "divergence")
        wanted = (objective for objective in self.goal.objectives if objective.metric in qualities)
        return next(wanted, Objective(task.metric, mode=task.mode))

    def _task(self, task: Task | None) -> Task:
        from ray_nascomp.tasks.known import task_of

        return task_of(str(self.metrics.get("task", "")), task)


def layers_of(folder: str | None, filesystem: pyarrow.fs.FileSystem) -> list[dict[str, Any]]:
    """The layer table of a checkpoint's manifest; empty if there is none that can be read."""
    layers = _manifest_of(folder, filesystem).get("layers", [])
    return layers if isinstance(layers, list) else []


def _manifest_of(folder: str | None, filesystem: pyarrow.fs.FileSystem) -> dict[str, Any]:
    """A checkpoint's manifest; empty if there is none that can be read."""
    if folder is None:
        return {}
    try:
        with filesystem.open_input_stream(f"{folder}/{_MANIFEST_FILE}") as stream:
            manifest = json.loads(stream.read())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _as_the_original_reads_it(task: Task, data: Data, is_own: bool) -> Data:
    """The test samples in the form that the task's original takes, such as in its own vocabulary."""
    original = task.original
    if original is None:
        return data
    if is_own and original.test_data is not None:
        return original.test_data
    if task.reads_alike(original):
        return data
    raise ConfigError(
        "test_data: the task's original reads its samples otherwise than the task; give each of the two its "
        "test_data when it is made"
    )
