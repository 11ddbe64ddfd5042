"""The results of a search, from a `ResultGrid` or from an experiment's folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.fs

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Constraint, Goal
from ray_nascomp.observations import Observation, Status
from ray_nascomp.pareto import front_indices, knee_index, normalised_hypervolume
from ray_nascomp.results.loading import TrialRecord, judged, read_experiment, read_grid
from ray_nascomp.results.retiming import keep_times, read_times, time_again, with_times
from ray_nascomp.results.selected import SelectedModel, layers_of

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from ray.tune import ResultGrid

    from ray_nascomp.tasks.base import Task

_OBSERVED = {
    "completed": Status.COMPLETED,
    "stopped": Status.STOPPED,
    "infeasible": Status.INFEASIBLE,
    "failed": Status.FAILED,
}


class Results:
    """What a search has found.

    Args:
        source: What `Tuner.fit` returned, or the folder of an experiment that is finished,
            running or interrupted: a local path, or a URI that pyarrow knows.
        goal: Objectives and constraints; read from the experiment if absent.

    Attributes:
        goal: Objectives and constraints.
        trials: All trials, in the order of their start.
        path: The experiment's folder.

    Raises:
        ConfigError: If the folder holds no experiment, or no goal is given or found.
    """

    def __init__(self, source: ResultGrid | str | Path, goal: Goal | None = None) -> None:
        if isinstance(source, (str, Path)):
            self._filesystem, self.path = _locate(source)
            self.trials = read_experiment(self.path, self._filesystem)
        else:
            self._filesystem, self.path = source.filesystem, source.experiment_path
            self.trials = read_grid(source)
        self.goal = goal or _recorded_goal(self.trials)
        times = read_times(self.path, self._filesystem)
        self.trials = [judged(with_times(trial, times.get(trial.trial_id, {})), self.goal) for trial in self.trials]

    def __len__(self) -> int:
        return len(self.trials)

    def __repr__(self) -> str:
        counts = pd.Series([trial.status for trial in self.trials]).value_counts()
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"Results({len(self)} trials: {states}; {len(self.front())} on the front)"

    def dataframe(self) -> pd.DataFrame:
        """One row a trial: trial_id, status, the config's values by path, the last metrics, error."""
        rows = []
        for trial in self.trials:
            metrics = {name: value for name, value in trial.metrics.items() if name not in _INTERNAL}
            rows.append(
                {
                    "trial_id": trial.trial_id,
                    "status": trial.status,
                    **flat(trial.config),
                    **metrics,
                    "error": trial.error,
                }
            )
        return pd.DataFrame(rows)

    def front(self) -> list[TrialRecord]:
        """Completed, feasible trials that no other dominates, by the first objective, best first."""
        return self._front_of([trial for trial in self.trials if trial.status == "completed"])

    def pareto_front(self) -> pd.DataFrame:
        """The rows of `dataframe` that are on the front, by the first objective, best first.

        As long as no trial has been completed, the front of what the others have reported last:
        column status tells.
        """
        completed = [trial for trial in self.trials if trial.status == "completed"]
        others = [trial for trial in self.trials if trial.status in ("stopped", "unfinished")]
        table = self.dataframe().set_index("trial_id", drop=False)
        return table.loc[[trial.trial_id for trial in self._front_of(completed or others)]].reset_index(drop=True)

    def hypervolume(self, reference: Mapping[str, float] | None = None) -> float:
        """Share of the box between the best and a reference value of each objective that the front dominates.

        Args:
            reference: Metric -> value that counts as worst. For objectives that are left out, the
                worst of all completed feasible trials.
        """
        losses = self._feasible_losses()
        if not len(losses):
            return 0.0
        return normalised_hypervolume(losses, losses.min(axis=0), self._nadir(losses, reference or {}))

    def best(self, objective: str | None = None, constraints: Sequence[Constraint] = ()) -> SelectedModel:
        """The model to take.

        Args:
            objective: Metric of the objective that matters most; the front's knee if absent: the
                result nearest to the best of everything.
            constraints: Further constraints on any reported metric.

        Raises:
            ConfigError: If the objective is not one of the goal's, or no trial fulfils everything.
        """
        names = [o.metric for o in self.goal.objectives]
        if objective is not None and objective not in names:
            raise ConfigError.unknown("objective", objective, names)
        wanted = Goal(self.goal.objectives, (*self.goal.constraints, *constraints))
        completed = [trial for trial in self.trials if trial.status == "completed"]
        front = [completed[i] for i in front_indices(wanted, [trial.metrics for trial in completed])]
        if not front:
            raise ConfigError(self._why_none(completed, wanted))
        losses = np.stack([wanted.losses(trial.metrics) for trial in front])
        if objective is None:
            chosen = front[knee_index(losses)]
        else:
            first = names.index(objective)
            order = np.lexsort((*losses.T, losses[:, first]))
            chosen = front[int(order[0])]
        return SelectedModel.from_trial(chosen, self.goal, self._filesystem)

    def trial(self, trial_id: str) -> SelectedModel:
        """The model of one trial, whatever became of it.

        Raises:
            ConfigError: If there is no such trial.
        """
        for trial in self.trials:
            if trial.trial_id == trial_id:
                return SelectedModel.from_trial(trial, self.goal, self._filesystem)
        raise ConfigError.unknown("trial", trial_id, [trial.trial_id for trial in self.front()])

    def retime(self, task: Task | None = None, *, progress: bool = True) -> None:
        """Times the files of all completed trials again, one after another, on this machine.

        Trials measure while others train beside them, which may shift a speedup by a fifth; near a limit that decides
        what is feasible. Nothing else should run meanwhile. latency_ms, speedup, speedup_spread and the goal's score
        are replaced, also for `Results` that are opened later: they lie in the experiment's folder, in latency.jsonl.
        Without completed trials nothing is done; what is timed before an interruption is kept.

        Args:
            task: The task; found by itself if it is alive in this process.
            progress: Whether stderr shows how far it is.

        Raises:
            ConfigError: If there is no task, or it is another one, none of the trials kept a file, or they were timed
                on nodes of their own (`latency_resources`), which this machine is not.
        """
        completed = [trial for trial in self.trials if trial.status == "completed"]
        times: dict[str, dict[str, float]] = {}
        if not completed:
            return
        try:
            for trial_id, row in time_again(completed, self.goal, self._filesystem, task, progress):
                times[trial_id] = row
        finally:
            self.trials = [with_times(trial, times.get(trial.trial_id, {})) for trial in self.trials]
            if times:
                keep_times(self.path, self._filesystem, times)

    def observations(self) -> list[Observation]:
        """The trials as observations, for `warm_start` of a searcher."""
        return [
            Observation(
                trial.trial_id,
                trial.config,
                {k: v for k, v in trial.metrics.items() if k not in _INTERNAL},
                _OBSERVED[trial.status],
                int(trial.metrics.get("training_iteration", 0)),
            )
            for trial in self.trials
            if trial.status in _OBSERVED
        ]

    def compare(self, other: Results) -> pd.DataFrame:
        """Puts this search and another side by side.

        Args:
            other: A search with the same objectives; constraints may differ.

        Returns:
            Rows "this" and "other" with path, trials, completed, front (its size), hypervolume (in
            one box that spans both), dominated (share of the front that the other's front
            dominates) and, by metric, the best value of each objective.

        Raises:
            ConfigError: If the other has other objectives.
        """
        if other.goal.objectives != self.goal.objectives:
            raise ConfigError("compare: the two searches have other objectives")
        tables = [results._feasible_losses() for results in (self, other)]
        every = np.concatenate(tables)
        rows = []
        for results, losses in zip((self, other), tables, strict=True):
            volume = 0.0
            if len(losses):
                volume = normalised_hypervolume(losses, every.min(axis=0), self._nadir(every, {}))
            rival = other if results is self else self
            rows.append(
                {
                    "path": results.path,
                    "trials": len(results),
                    "completed": sum(trial.status == "completed" for trial in results.trials),
                    "front": len(results.front()),
                    "hypervolume": volume,
                    "dominated": _share_dominated(results, rival),
                    **results._best_values(),
                }
            )
        return pd.DataFrame(rows, index=["this", "other"])

    def history(self) -> pd.DataFrame:
        """Hypervolume after each completed trial, in the box of all: columns trial, seconds, hypervolume."""
        completed = sorted(
            (t for t in self.trials if t.status == "completed"), key=lambda t: t.metrics.get("timestamp", 0)
        )
        every = self._feasible_losses()
        if not len(every):
            return pd.DataFrame(columns=["trial", "seconds", "hypervolume"])
        ideal, nadir = every.min(axis=0), self._nadir(every, {})
        start = min(t.metrics.get("timestamp", 0) - t.metrics.get("time_total_s", 0) for t in completed)
        rows, losses = [], []
        for number, trial in enumerate(completed, start=1):
            if self.goal.is_feasible(trial.metrics):
                losses.append(self.goal.losses(trial.metrics))
            volume = normalised_hypervolume(np.array(losses), ideal, nadir) if losses else 0.0
            seconds = trial.metrics.get("timestamp", 0) - start
            rows.append({"trial": number, "seconds": seconds, "hypervolume": volume})
        return pd.DataFrame(rows)

    def importance(self) -> pd.DataFrame:
        """Share of each dimension (rows) in what changes each objective (columns), from fitted forests.

        Raises:
            ConfigError: If scikit-learn is not installed, or too few trials have been completed.
        """
        from ray_nascomp.results.importance import importance_table

        return importance_table(self)

    def plot_front(self) -> go.Figure:
        """The front among all completed trials, as a Plotly figure."""
        from ray_nascomp.results.plots import front_figure

        return front_figure(self)

    def plot_history(self) -> go.Figure:
        """Hypervolume against completed trials, as a Plotly figure."""
        from ray_nascomp.results.plots import history_figure

        return history_figure(self)

    def plot_parallel(self) -> go.Figure:
        """Dimensions and objectives in parallel coordinates, as a Plotly figure."""
        from ray_nascomp.results.plots import parallel_figure

        return parallel_figure(self)

    def plot_importance(self) -> go.Figure:
        """What each dimension matters for each objective, as a Plotly figure.

        Raises:
            ConfigError: If scikit-learn is not installed, or too few trials have been completed.
        """
        from ray_nascomp.results.plots import importance_figure

        return importance_figure(self)

    def layers(self, trial: TrialRecord) -> list[dict[str, Any]]:
        """A trial's layers before and after, from its checkpoint; empty if there is none that can be read.

        Each layer has a name, type, group, sparsity and bits, and channels, params, macs and bytes
        with `_before` and `_after` behind them.
        """
        return layers_of(trial.checkpoint, self._filesystem)

    def report(self, path: str | Path) -> Path:
        """Writes one HTML file that works offline; returns its path."""
        from ray_nascomp.results.report import write_report

        return write_report(self, Path(path))

    def _front_of(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        front = [trials[i] for i in front_indices(self.goal, [trial.metrics for trial in trials])]
        return sorted(front, key=lambda trial: self.goal.losses(trial.metrics)[0])

    def _feasible_losses(self) -> np.ndarray:
        rows = [
            self.goal.losses(trial.metrics)
            for trial in self.trials
            if trial.status == "completed" and self.goal.is_feasible(trial.metrics)
        ]
        return np.array(rows, dtype=float).reshape(len(rows), len(self.goal.objectives))

    def _best_values(self) -> dict[str, float]:
        losses = self._feasible_losses()
        best = losses.min(axis=0) if len(losses) else np.full(len(self.goal.objectives), np.nan)
        return {o.metric: float(loss) * o.sign for o, loss in zip(self.goal.objectives, best, strict=True)}

    def _nadir(self, losses: np.ndarray, reference: Mapping[str, float]) -> np.ndarray:
        worst = losses.max(axis=0)
        for index, objective in enumerate(self.goal.objectives):
            if objective.metric in reference:
                worst[index] = reference[objective.metric] * objective.sign
        return worst

    def _why_none(self, completed: list[TrialRecord], goal: Goal) -> str:
        if not completed:
            statuses = pd.Series([trial.status for trial in self.trials]).value_counts().to_dict()
            hint = (
                "; a trial is complete after epochs + 1 reports, so a scheduler's max_t has to be at least that, and"
                " what FeasibilityScheduler ends does not promise to fulfil the constraints"
                if "stopped" in statuses
                else ""
            )
            return f"no trial has been completed: {statuses}{hint}"
        nearest = min(completed, key=lambda trial: goal.violation(trial.metrics))
        values = {c.metric: nearest.metrics.get(c.metric) for c in goal.constraints}
        bounds = ", ".join(str(constraint) for constraint in goal.constraints)
        return f"none of {len(completed)} completed trials fulfils {bounds}; the nearest has {values}"


_INTERNAL = {
    "goal", "task", "config", "trial_id", "done", "date", "pid", "hostname", "node_ip", "experiment_tag",
    "iterations_since_restore", "time_since_restore", "should_checkpoint", "__duplicate__", "checkpoint_dir_name",
}  # fmt: skip


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level, its keys joined by "/"."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            result.update(flat(value, f"{prefix}{key}/"))
        else:
            result[f"{prefix}{key}"] = value
    return result


def _locate(source: str | Path) -> tuple[pyarrow.fs.FileSystem, str]:
    text = str(source)
    if "://" in text:
        return pyarrow.fs.FileSystem.from_uri(text)
    return pyarrow.fs.LocalFileSystem(), str(Path(text).expanduser().resolve())


def _share_dominated(results: Results, rival: Results) -> float:
    """Share of a front that a rival's front dominates; NaN where there is no front."""
    front, rivals = results.front(), rival.front()
    if not front:
        return float("nan")
    beaten = [any(results.goal.dominates(r.metrics, trial.metrics) for r in rivals) for trial in front]
    return sum(beaten) / len(beaten)


def _recorded_goal(trials: list[TrialRecord]) -> Goal:
    for trial in trials:
        text = trial.metrics.get("goal")
        if isinstance(text, str):
            return Goal.from_json(text)
    failed = [trial for trial in trials if trial.error]
    if failed and len(failed) == len(trials):
        last = failed[0].error.strip().splitlines()[-1]
        raise ConfigError(f"all {len(trials)} trials failed; {failed[0].trial_id} with {last}")
    raise ConfigError("goal: none was given and no trial has reported one; Results(..., goal=Goal(...)) is needed")
