"""Tasks: the user's model, data, loss and metric."""

from ray_nascomp.tasks.base import Task

__all__ = ["Task"]
