"""Measurements on the nodes that they are for: a Ray task that asks for a node's custom resource.

Start the nodes of the target's kind with a resource of their own, such as `{"edge": 1}`. A
measurement that takes all of it has the node's measurements to itself; it may still share the
node with trials unless these are kept away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_nascomp.deployment.runtime import Latency, Sample, make_session, trial_latency
from ray_nascomp.errors import ConfigError

Timer = Callable[[bytes, bytes, Sample, Sample | None], Latency]
"""Function (original's file, compressed file, sample, the original's if that is another) -> latency."""


def run_elsewhere(resources: Mapping[str, float], function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's result on a node that has the resources; waits until one is free.

    Args:
        resources: Custom resources that the call takes, such as `{"edge": 1}`.
        function: The function; it is run again, up to three times, if its node dies.
        arguments: Its arguments.
    """
    # Inside a trial a task would be put into the trial's own placement group, which has no such resource.
    task = ray.remote(
        num_cpus=0,
        resources=dict(resources),
        max_retries=3,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # type: ignore[arg-type]
    )(function)
    return ray.get(task.remote(*arguments))


def timer_elsewhere(resources: Mapping[str, float]) -> Timer:
    """A timer that compares two files' latency on a node that has the resources.

    Raises:
        ConfigError: If no resource is named, or one is not positive.
    """
    if not resources or not all(value > 0 for value in resources.values()):
        raise ConfigError(
            f"latency_resources: {dict(resources)!r} was given, names of resources with positive numbers are allowed"
        )

    def time_elsewhere(original: bytes, compressed: bytes, sample: Sample, known: Sample | None) -> Latency:
        result: Latency = run_elsewhere(resources, _compare, original, compressed, sample, known)
        return result

    return time_elsewhere


def _compare(original: bytes, compressed: bytes, sample: Sample, known: Sample | None) -> Latency:
    return trial_latency(make_session(original), make_session(compressed), sample, known)
