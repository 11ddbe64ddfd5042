"""The command `ray-nascomp`."""

from ray_nascomp.cli.main import main

__all__ = ["main"]
