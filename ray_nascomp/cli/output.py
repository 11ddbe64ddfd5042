"""Results go to stdout, as a table or as JSON; all else to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import click
from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 160

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for scripts.")


def messages() -> Console:
    """Where progress and remarks go."""
    return Console(stderr=True, highlight=False)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows what is being done; what other libraries print meanwhile goes to stderr too."""
    with messages().status(what), redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """Prints JSON; what JSON does not know becomes null or text."""
    click.echo(json.dumps(_plain(value), indent=1, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Prints a table; numbers stand to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    body = [list(row) for row in rows]
    for place, column in enumerate(columns):
        is_number = bool(body) and all(isinstance(row[place], (int, float, type(None))) for row in body)
        table.add_column(column, justify="right" if is_number or place else "left", overflow="fold")
    for row in body:
        table.add_row(*(brief(value) for value in row))
    # A pipe has no width of its own; names should not be broken there.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(highlight=False, width=width).print(table)


def brief(value: Any) -> str:
    """A value for people: 4 digits that count, thousands apart."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
