"""The command's group: what it can do, its exit codes, and how mistakes are told."""

from __future__ import annotations

from typing import Any

import click

from ray_nascomp import __version__
from ray_nascomp.cli.benchmark import benchmark
from ray_nascomp.cli.compress import compress
from ray_nascomp.cli.doctor import doctor
from ray_nascomp.cli.experiments import export, report
from ray_nascomp.cli.inspecting import inspect
from ray_nascomp.cli.search import search
from ray_nascomp.errors import ConfigError, UntraceableModelError

_COMMANDS = (compress, search, report, export, inspect, benchmark, doctor)


class _Group(click.Group):
    """Commands in the order of use; a wrong value from the user ends with its message, not with a trace."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigError, UntraceableModelError) as error:
            raise click.UsageError(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ray-nascomp")
def main() -> None:
    """Search a network's architecture and its compression together.

    \b
    Exit codes:
      0  done
      1  something broke
      2  a wrong value was given, or a model that does not run on its data
      3  the search found nothing that fulfils the limits

    \b
    Examples:
      ray-nascomp compress task.py:make_task --max-drop 1% --max-latency 0.5x -o small
      ray-nascomp compress ./my-bert --data ./reviews --max-drop 1% -o small
      ray-nascomp search search.toml
      ray-nascomp report small/search
    """


for _command in _COMMANDS:
    main.add_command(_command)
