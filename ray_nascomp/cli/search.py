"""`ray-nascomp search`: a search that a YAML or TOML file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ray_nascomp.cli.output import as_json_option, print_json, print_table, working
from ray_nascomp.cli.running import nothing_found, run_search
from ray_nascomp.cli.search_file import read_search


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--resume", is_flag=True, help="Go on with the interrupted search in the output folder.")
@click.option("--check", is_flag=True, help="Check the file, show the dimensions, and stop.")
@as_json_option
def search(file: Path, resume: bool, check: bool, as_json: bool) -> None:
    """Run the search that FILE describes, YAML or TOML; print the front.

    Paths in the file are relative to it. Everything but the task has a default.

    \b
    Example, search.toml:
      task = "task.py:make_task"     # or a table: {model = "./my-bert", data = "./reviews"}
      output = "results/first"
      trials = 64
      epochs = 8                     # also: workers = 2, time = "2h", seed = 0
    \b
      [goal]
      objectives = ["accuracy", "speedup", "size_mb min"]
      constraints = ["accuracy_drop <= 0.01"]
    \b
      [space]                        # arguments of compression_space
      bits = "layer"
    \b
      [set]                          # by path: a value, or a list to choose from
      "prune/round_to" = 16
      "prune/method" = ["l1_norm", "taylor"]
    \b
      [searcher]
      name = "evolutionary"          # and its arguments
    \b
      [scheduler]
      name = "pareto_asha"
      grace_period = 3
    """
    with working("loading the model and its data"):
        described = read_search(file, resume=None if check else resume)
    if check:
        dimensions = described.dimensions()
        if as_json:
            print_json({"dimensions": dict(dimensions), "output": str(described.folder)})
        else:
            print_table(("dimension", "values"), dimensions)
        return
    results = run_search(
        described.task,
        described.goal,
        described.space,
        described.searcher,
        described.scheduler,
        described.effort,
        described.folder,
        resume=resume,
    )
    report = results.report(described.folder / "report.html")
    front = results.front()
    if not front:
        raise nothing_found(results, "no trial fulfils the constraints")
    columns = ("trial_id", *described.goal.metrics)
    rows = [{"trial_id": t.trial_id, **{name: t.metrics.get(name) for name in columns[1:]}} for t in front]
    if as_json:
        entries: list[dict[str, Any]] = [{**row, "config": t.config} for row, t in zip(rows, front, strict=True)]
        print_json({"front": entries, "hypervolume": results.hypervolume(), "folder": str(described.folder)})
        return
    print_table(columns, ([row[name] for name in columns] for row in rows), title=f"the front of {len(results)} trials")
    click.echo(f"\n{report}")
