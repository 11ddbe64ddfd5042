"""The tasks of this process, by what they hold."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task

_alive: list[weakref.ref[Task]] = []
"""Of tasks with one fingerprint the last is the one that is meant."""


def note_task(task: Task) -> None:
    """Takes in a task that the user has made."""
    _alive.append(weakref.ref(task, _alive.remove))


def note_copy(task: Task) -> None:
    """Takes in a task that has travelled here: any other with its fingerprint is meant before it."""
    _alive.insert(0, weakref.ref(task, _alive.remove))


def forget_task(task: Task) -> None:
    """Leaves out a task that nobody else is to find."""
    _alive[:] = [reference for reference in _alive if reference() is not task]


def find_task(fingerprint: str) -> Task | None:
    """The task of this process with a fingerprint, if it is still in use."""
    tasks = [task for reference in _alive if (task := reference()) is not None]
    return next((task for task in reversed(tasks) if task.fingerprint == fingerprint), None)


def task_of(fingerprint: str, task: Task | None) -> Task:
    """The task that a search was made with: the one that is given, or this process's.

    Raises:
        ConfigError: If there is none, or the given one is another.
    """
    found = task or find_task(fingerprint)
    if found is None:
        raise ConfigError("task: the task is not alive in this process; give it as task=")
    if found.fingerprint != fingerprint:
        raise ConfigError(f"task: it is another task ({found.fingerprint}) than the search's ({fingerprint})")
    return found
