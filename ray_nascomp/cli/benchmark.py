"""`ray-nascomp benchmark`: how fast two files are, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_nascomp.cli.output import as_json_option, print_json, print_table
from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    import onnxruntime
    import torch


class _Shape(click.ParamType):
    """An input's shape without the batch: "input_ids=128"."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, list[int]]:
        if isinstance(value, tuple):
            return value
        name, _, sizes = str(value).partition("=")
        parts = sizes.replace("x", ",").split(",")
        if not name or not all(part.strip().isdigit() for part in parts):
            self.fail(f"{value!r} was given; a text such as input_ids=128 or images=3,224,224 is allowed", param, ctx)
        return name, [int(part) for part in parts]


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("original", type=_FILE)
@click.argument("compressed", type=_FILE)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 32), show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--shape", "shapes", type=_Shape(), multiple=True, help="Sizes that the file leaves open: input_ids=128.")
@click.option("--rounds", type=click.IntRange(3), default=50, show_default=True)
@as_json_option
def benchmark(
    original: Path,
    compressed: Path,
    batches: tuple[int, ...],
    threads: int,
    shapes: tuple[tuple[str, list[int]], ...],
    rounds: int,
    as_json: bool,
) -> None:
    """Time two ONNX files in turn, in one process, on the same inputs.

    The speedup is the median over rounds of the ratio within a round, so that a busy machine
    slows both; the spread is its interquartile range. Inputs are noise, integers are ones.

    \b
    Examples:
      ray-nascomp benchmark original.onnx small/model.onnx
      ray-nascomp benchmark a.onnx b.onnx --batch 8 --threads 4 --shape input_ids=128
    """
    from ray_nascomp.deployment.runtime import compare_latency, make_session

    first, second = (make_session(path, threads) for path in (original, compressed))
    _check_alike(first, second)
    rows = []
    for batch in batches:
        inputs = _inputs(first, batch, dict(shapes))
        latency = compare_latency(first, second, inputs, tuple(inputs), rounds)
        rows.append({"batch": batch, **vars(latency)})
    sizes = [path.stat().st_size / 1e6 for path in (original, compressed)]
    if as_json:
        print_json(
            {"threads": threads, "size_mb": dict(zip(("original", "compressed"), sizes, strict=True)), "latency": rows}
        )
        return
    columns = ("batch", "original ms", "compressed ms", "speedup", "spread")
    print_table(columns, [list(row.values()) for row in rows], title=f"ONNX Runtime, {threads} thread(s)")
    click.echo(f"\n{sizes[0]:.4g} MB and {sizes[1]:.4g} MB: {sizes[0] / sizes[1]:.1f}x smaller")


def _check_alike(original: onnxruntime.InferenceSession, compressed: onnxruntime.InferenceSession) -> None:
    names = [{entry.name for entry in session.get_inputs()} for session in (original, compressed)]
    if names[0] != names[1]:
        raise ConfigError(f"compressed: its inputs are {sorted(names[1])}, the original's are {sorted(names[0])}")


def _inputs(session: onnxruntime.InferenceSession, batch: int, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    import torch

    entries = {entry.name: entry for entry in session.get_inputs()}
    for name in shapes:
        if name not in entries:
            raise ConfigError.unknown("shape", name, entries)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, entry in entries.items():
        sizes = shapes.get(name, entry.shape[1:])
        if not all(isinstance(size, int) for size in sizes):
            raise ConfigError(
                f"shape: input {name} is {list(entry.shape)}; give its open sizes, as in --shape {name}=128"
            )
        if isinstance(entry.shape[0], int) and entry.shape[0] != batch:
            raise ConfigError(f"batch: {batch} was given, the file takes {entry.shape[0]} only")
        shape = (batch, *sizes)
        if "float" in entry.type:
            inputs[name] = torch.randn(shape, generator=generator)
        elif entry.type in ("tensor(int64)", "tensor(int32)"):
            inputs[name] = torch.ones(shape, dtype=torch.int64 if "64" in entry.type else torch.int32)
        else:
            raise ConfigError(f"original: input {name} is {entry.type}; floats and integers are supported")
    return inputs
