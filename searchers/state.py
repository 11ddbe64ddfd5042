"""A searcher's state on disk: lines of JSON, so that a file cut short is good up to its last whole line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray_nascomp.errors import ConfigError
from ray_nascomp.observation_log import plain
from ray_nascomp.observations import Observation

State = tuple[dict[str, Any], list[Observation], dict[str, Any]]


def write_state(
    path: str | Path, head: Mapping[str, Any], observations: Iterable[Observation], tail: Mapping[str, Any]
) -> None:
    """Writes a state.

    Args:
        path: The file.
        head: What does not change during a search.
        observations: All observations, oldest first; one line each.
        tail: What changes with every trial.
    """
    parts = [{"head": head}, *({"observation": o.to_dict()} for o in observations), {"tail": tail}]
    Path(path).write_text("".join(json.dumps(part, default=plain) + "\n" for part in parts))


def read_state(path: str | Path) -> State:
    """Head, observations and tail of a state; the tail is empty if the file was cut short.

    Raises:
        ConfigError: If not even the first line is whole.
    """
    head: dict[str, Any] | None = None
    observations: list[Observation] = []
    tail: dict[str, Any] = {}
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            part = json.loads(line)
        except ValueError:
            break
        if not isinstance(part, dict):
            break
        head = part.get("head", head)
        if "observation" in part:
            observations.append(Observation.from_dict(part["observation"]))
        tail = part.get("tail", tail)
    if head is None:
        raise ConfigError(f"{path} is not a searcher's state, or it was cut short in its first line")
    return head, observations, tail


def read_observations(source: Any) -> list[Observation]:
    """Earlier observations: of a state's file, of anything that has `observations`, or as they are.

    Raises:
        ConfigError: If it is none of these.
    """
    if source is None:
        return []
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise ConfigError(f"warm_start: {str(source)!r} was given, the path of a state file is allowed")
        return read_state(source)[1]
    if hasattr(source, "observations"):
        found = source.observations
        source = found() if callable(found) else found
    observations = list(source)
    if not all(isinstance(observation, Observation) for observation in observations):
        raise ConfigError("warm_start: only Observation values, Results, or a state file's path are allowed")
    return observations
