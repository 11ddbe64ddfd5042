"""Candidates of configs, as a run makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_nascomp import Task
from ray_nascomp.pipeline import CompressionRun
from ray_nascomp.pipeline.candidate import Candidate, make_candidate


def candidate_of(task: Task, config: Mapping[str, Any]) -> Candidate:
    run = CompressionRun(task, config, epochs=1)
    return make_candidate(task, run.plan, run.costs, run.trainer)
