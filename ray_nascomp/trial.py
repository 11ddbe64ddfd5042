"""The trainable that Tune runs: one config, one report after each step of its compression."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
from ray import tune

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal
from ray_nascomp.plan import CONTINUE_FROM
from ray_nascomp.recorded import recorded
from ray_nascomp.tasks.base import Task
from ray_nascomp.time_limit import time_limited

if TYPE_CHECKING:
    from ray_nascomp.deployment.elsewhere import Timer
    from ray_nascomp.pipeline.stage_cache import StageCache

_FINISHED = {"__duplicate__": True, "done": True}


def compression_trainable(
    task: Task,
    goal: Goal,
    *,
    epochs: int = 8,
    time_limit_s: float | None = None,
    latency_resources: Mapping[str, float] | None = None,
    cache: str | Path | StageCache | None = None,
) -> type[tune.Trainable]:
    """A Tune trainable that carries out configs of `compression_space(task)` on a task.

    A trial reports `epochs + 1` times: the compressed model before training, then after each
    epoch; the last report is measured on the exported file, which the trial's checkpoint holds.
    Every report has the same keys (see `docs/guide.md`). The task's weights and data travel
    to the workers once, through the object store, and are shared there. What is reported is
    `recorded`, and outlives the driver; a folder with results of another task, goal or number of
    epochs is refused.

    Args:
        task: The task.
        goal: What the search is after; every report's `score` is made from it.
        epochs: Epochs of fine-tuning.
        time_limit_s: Seconds after which a trial counts as hanging and fails; see `time_limited`.
        latency_resources: Custom resources of the nodes on which latency is measured, such as
            `{"edge": 1}`; a measurement takes them while it runs. The trial's own node if absent.
        cache: Folder or URI of a stage cache, from which trials take what others have carried out
            already; a `StageCache` for one of another size than 10 GB. None keeps no stages.

    Raises:
        ConfigError: If an argument is not allowed, or the goal looks at a metric that is not reported.
        UntraceableModelError: If the task's model does not run on its own inputs.
    """
    from ray_nascomp.costs import CostModel
    from ray_nascomp.deployment.elsewhere import timer_elsewhere
    from ray_nascomp.pipeline.report import reported_metrics
    from ray_nascomp.pipeline.reuse import origin_of
    from ray_nascomp.pipeline.stage_cache import StageCache
    from ray_nascomp.tasks.transport import pack

    if not isinstance(task, Task):
        raise ConfigError(f"task: a {type(task).__name__} was given, a ray_nascomp.Task is allowed")
    if not isinstance(goal, Goal):
        raise ConfigError(f"goal: {goal!r} was given, a ray_nascomp.Goal is allowed")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ConfigError(f"epochs: {epochs!r} was given, a whole number of 0 or more is allowed")
    goal.check_reported(reported_metrics(task))
    for objective in goal.objectives:
        if objective.metric == task.metric and objective.mode != task.mode:
            raise ConfigError(
                f"objective {objective.metric!r}: mode {objective.mode!r} was given, the task says {task.mode!r}"
            )
    packed = pack((task, CostModel(task)))
    stages = None
    if cache is not None:
        stages = (cache if isinstance(cache, StageCache) else StageCache(cache)), origin_of(task)
    identity = {"task": task.fingerprint, "goal": goal.to_json(), "epochs": epochs}
    trainable = recorded(CompressionTrial, identity)
    if time_limit_s is not None:
        trainable = time_limited(trainable, time_limit_s)
    timer = timer_elsewhere(latency_resources) if latency_resources is not None else None
    return tune.with_parameters(trainable, packed=packed, goal=goal, epochs=epochs, timer=timer, stages=stages)


class CompressionTrial(tune.Trainable):
    """One trial: see `compression_trainable`, which makes it."""

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        packed: Any,
        goal: Goal,
        epochs: int,
        timer: Timer | None,
        stages: tuple[StageCache, str] | None,
    ) -> None:
        """Unpacks the task, once in a worker's life, and checks the config."""
        import torch

        from ray_nascomp.pipeline.measure import time_with
        from ray_nascomp.tasks.transport import unpack

        threads = int(self.trial_resources.required_resources.get("CPU", 1)) if self.trial_resources else 1
        torch.set_num_threads(max(1, threads))
        self._task, self._costs = unpack(packed)
        if timer is not None:
            time_with(self._task, timer)
        if self._has_gpu():
            self._task.model.to("cuda")
        self._goal = goal
        self._epochs = epochs
        self._stages = stages
        self._start(config)

    def _has_gpu(self) -> bool:
        import torch

        wanted = self.trial_resources.required_resources.get("GPU", 0) if self.trial_resources else 0
        return wanted > 0 and torch.cuda.is_available()

    def step(self) -> dict[str, Any]:
        """Takes the next step; after the last one says that the trial is done."""
        if self._run.is_done:
            return dict(_FINISHED)
        return dict(self._run.step().metrics)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Goes on with another config in the same worker."""
        self._start(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes the run: model.onnx, model.safetensors, manifest.json."""
        self._run.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]
        """Goes on where a saved run was; the config stays the trial's own.

        Where a scheduler has changed the config to one that continues from another trial, that
        one's checkpoint is gone on from.
        """
        from ray_nascomp.pipeline.checkpoint import read_manifest

        self._start(self.config)
        folder, source = Path(checkpoint), self.config.get(CONTINUE_FROM)
        if source is None or read_manifest(folder)["config"] == json.loads(json.dumps(self.config, default=str)):
            self._run.restore(folder)
            return
        storage: Any = self._storage
        with tempfile.TemporaryDirectory() as fetched:
            path = f"{storage.experiment_fs_path}/{source}"
            pyarrow.fs.copy_files(path, fetched, source_filesystem=storage.storage_filesystem)
            self._run.continue_from(fetched)

    def _start(self, config: dict[str, Any]) -> None:
        from ray_nascomp.pipeline import CompressionRun
        from ray_nascomp.pipeline.reuse import Reuse

        reuse = Reuse(*self._stages) if self._stages is not None else None
        self._run = CompressionRun(self._task, config, self._epochs, self._goal, self._costs, reuse)
