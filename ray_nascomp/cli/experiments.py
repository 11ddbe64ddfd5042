"""`ray-nascomp report` and `export`: what a finished, running or interrupted search has found."""

from __future__ import annotations

from pathlib import Path

import click

from ray_nascomp.cli.limits import Bound
from ray_nascomp.cli.output import as_json_option, print_json, print_table
from ray_nascomp.cli.running import nothing_found
from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Constraint


@click.command()
@click.argument("folder")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The HTML file; report.html in FOLDER if absent.")
@as_json_option
def report(folder: str, output: Path | None, as_json: bool) -> None:
    """Write the report of the search in FOLDER, and print its front.

    FOLDER may be a URI such as s3://bucket/search; then --output is needed. The search may be
    running still.

    \b
    Examples:
      ray-nascomp report small/search
      ray-nascomp report ~/ray_results/first -o first.html
      ray-nascomp report small/search --json | jq '.front[0].config'
    """
    from ray_nascomp import Results

    results = Results(folder)
    if output is None and "://" in folder:
        raise ConfigError(f"output: none was given; {folder} is not on this machine")
    written = results.report(output or Path(folder).expanduser() / "report.html")
    columns = ("trial_id", *results.goal.metrics)
    front = results.front()
    if as_json:
        statuses = [trial.status for trial in results.trials]
        print_json(
            {
                "trials": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
                "hypervolume": results.hypervolume(),
                "front": [
                    {"trial_id": t.trial_id, "config": t.config}
                    | {name: t.metrics.get(name) for name in results.goal.metrics}
                    for t in front
                ],
                "report": str(written),
            }
        )
        return
    rows = [[t.trial_id, *(t.metrics.get(name) for name in columns[1:])] for t in front]
    print_table(columns, rows, title=str(results))
    click.echo(f"\n{written}")


@click.command()
@click.argument("folder")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), required=True, help="A file .onnx, or a folder for all."
)
@click.option("--trial", help="Its id; the knee, or what --prefer and --limit say, if absent.")
@click.option("--prefer", help="Objective that matters most.")
@click.option("--limit", "bounds", type=Bound(), multiple=True, help='"size_mb <= 1"; may be repeated.')
@as_json_option
def export(
    folder: str, output: Path, trial: str | None, prefer: str | None, bounds: tuple[Constraint, ...], as_json: bool
) -> None:
    """Copy a model out of the search in FOLDER.

    \b
    Examples:
      ray-nascomp export small/search -o model.onnx
      ray-nascomp export small/search --prefer speedup --limit "accuracy_drop <= 0.005" -o fast
      ray-nascomp export small/search --trial 5c1f_00012 -o that.onnx
    """
    from ray_nascomp import Results

    results = Results(folder)
    if trial is not None:
        if prefer or bounds:
            raise ConfigError(
                "trial: it was given together with --prefer or --limit, only one way to choose is allowed"
            )
        chosen = results.trial(trial)
    else:
        try:
            chosen = results.best(prefer, bounds)
        except ConfigError as error:
            if "objective" in str(error):
                raise
            raise nothing_found(results, str(error)) from error
    path = chosen.export(output)
    if as_json:
        metrics = {name: value for name, value in chosen.metrics.items() if isinstance(value, (int, float))}
        print_json({"trial": chosen.trial_id, "path": str(path), "config": chosen.config, "metrics": metrics})
    else:
        values = "  ".join(f"{name} {chosen.metrics.get(name):.4g}" for name in results.goal.metrics)
        click.echo(f"{path}: trial {chosen.trial_id}  {values}")
