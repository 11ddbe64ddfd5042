"""What a trial reports: the same keys after every step, finite values, infeasible results included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_nascomp.deployment.runtime import Latency
from ray_nascomp.goals import WORST_SCORE, Goal, Objective
from ray_nascomp.pipeline.measure import Artifact, Quality, baseline_of, is_timed_elsewhere, worst_quality
from ray_nascomp.tasks.base import Task

if TYPE_CHECKING:
    from ray_nascomp.pipeline.run import CompressionRun

STAGES = ("prune", "finetune", "quantize", "export", "measure")


@dataclass(frozen=True)
class Measurement:
    """What a step has measured.

    Attributes:
        quality: What the outputs on the validation data are worth.
        stage: "compressed", "finetuned" or "exported".
        artifact: The file whose bytes and speed are reported.
    """

    quality: Quality
    stage: str
    artifact: Artifact


def goal_of(task: Task, goal: Goal | None) -> Goal:
    """The goal, or the task's metric alone."""
    return goal or Goal([Objective(task.metric, task.mode)])


def reported_metrics(task: Task) -> tuple[str, ...]:
    """Names of the metrics that a trial on the task reports, which a goal may look at."""
    return (task.metric, f"{task.metric}_drop", "divergence", *_COSTS, *_MEASURED)


_COSTS = ("params", "macs", "bitops", "params_ratio", "macs_ratio")
_MEASURED = ("size_mb", "size_ratio", "latency_ms", "speedup", "speedup_spread", "export_error")


def metrics_of(run: CompressionRun, measurement: Measurement) -> dict[str, Any]:
    """The report of a step."""
    baseline = baseline_of(run.task)
    size = len(measurement.artifact.content)
    cost = run.costs(run.config)
    values = {
        **_quality_metrics(measurement.quality, run.task),
        **{name: cost[name] for name in _COSTS},
        "size_mb": size / 1e6,
        "size_ratio": len(baseline.content) / size,
        **latency_metrics(measurement.artifact.latency),
        "export_error": measurement.artifact.error,
    }
    return _report(run, values, measurement.stage, "")


def _quality_metrics(quality: Quality, task: Task) -> dict[str, float]:
    return {
        "divergence": quality.divergence,
        task.metric: quality.value,
        f"{task.metric}_drop": task.drop(quality.value, baseline_of(task).value),
    }


def latency_metrics(latency: Latency) -> dict[str, float]:
    """What a report says of an exported file's speed."""
    return {"latency_ms": latency.compressed_ms, "speedup": latency.speedup, "speedup_spread": latency.spread}


def infeasible_metrics(run: CompressionRun, reason: str) -> dict[str, Any]:
    """The report of a plan that cannot be carried out: the worst quality, the original's costs."""
    baseline = baseline_of(run.task)
    dense = run.costs({})
    values = {
        **_quality_metrics(worst_quality(run.task), run.task),
        **{name: dense[name] for name in _COSTS},
        "size_mb": len(baseline.content) / 1e6,
        "size_ratio": 1.0,
        "latency_ms": 0.0,
        "speedup": 1.0,
        "speedup_spread": 0.0,
        "export_error": 0.0,
    }
    return _report(run, values, "infeasible", reason)


def _report(run: CompressionRun, values: dict[str, Any], stage: str, reason: str) -> dict[str, Any]:
    goal = goal_of(run.task, run.goal)
    feasible = not reason
    return {
        **values,
        "score": goal.score(values) if feasible else WORST_SCORE,
        "feasible": feasible,
        "reason": reason,
        "stage": stage,
        "epoch": run.steps_done,
        "final": stage in ("exported", "infeasible"),
        "timed_elsewhere": is_timed_elsewhere(run.task),
        "goal": goal.to_json(),
        "task": run.task.fingerprint,
        **{f"seconds_{name}": run.seconds.get(name, 0.0) for name in STAGES},
        "cache_hits": run.reuse.hits if run.reuse is not None else 0,
        "cache_misses": run.reuse.misses if run.reuse is not None else 0,
    }
