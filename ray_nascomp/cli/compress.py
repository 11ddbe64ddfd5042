"""`ray-nascomp compress`: from a model and limits to a folder with a smaller model."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_nascomp.cli.limits import Bound, Drop, Duration, Limit
from ray_nascomp.cli.output import as_json_option, messages, print_json, print_table, working
from ray_nascomp.cli.running import Effort, check_folder, nothing_found, run_search, workers_by_default
from ray_nascomp.cli.sources import load_task, source_options
from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Constraint, Goal, Objective

if TYPE_CHECKING:
    from ray_nascomp.results import SelectedModel
    from ray_nascomp.tasks.base import Task

_REFINED = 3


@click.command()
@source_options
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder for all that comes out.")
@click.option("--max-drop", type=Drop(), help="What may be lost of the metric: 1% is 0.01.")
@click.option("--max-latency", type=Limit("latency"), help="0.5x of the original's, or 2ms.")
@click.option("--max-size", type=Limit("size"), help="0.25x of the original's file, or 10MB.")
@click.option("--max-params", type=Limit("params"), help="0.5x of the original's, or 1M.")
@click.option("--max-macs", type=Limit("macs"), help="0.5x of the original's, or 50M.")
@click.option("--limit", "bounds", type=Bound(), multiple=True, help='Any further one: "export_error <= 0.01".')
@click.option("--prefer", help="Objective that decides among good models; the knee of all if absent.")
@click.option("--trials", type=click.IntRange(1), default=32, show_default=True)
@click.option("--epochs", type=click.IntRange(0), default=3, show_default=True, help="Epochs of a trial.")
@click.option(
    "--refine", type=click.IntRange(0), help=f"Epochs of the chosen model; {_REFINED} times --epochs if absent."
)
@click.option("--time", "seconds", type=Duration(), help="Stop the search after 30m, 2h, ...")
@click.option("--workers", type=click.IntRange(1), help="Trials at a time; one for each core if absent.")
@click.option("--bits", type=click.Choice(["uniform", "layer"]), default="layer", show_default=True)
@click.option("--seed", type=int)
@click.option("--resume", is_flag=True, help="Go on with the interrupted search in the output folder.")
@as_json_option
def compress(
    output: Path,
    max_drop: float | None,
    max_latency: Constraint | None,
    max_size: Constraint | None,
    max_params: Constraint | None,
    max_macs: Constraint | None,
    bounds: tuple[Constraint, ...],
    prefer: str | None,
    trials: int,
    epochs: int,
    refine: int | None,
    seconds: float | None,
    workers: int | None,
    bits: Any,
    seed: int | None,
    resume: bool,
    as_json: bool,
    **source: Any,
) -> None:
    """Compress a model within limits; the result is a folder.

    SOURCE is file.py:function, where the function returns a ray_nascomp.Task, or a HuggingFace
    model (a folder or a name), which needs --data: a folder that the datasets library saved, a
    folder with train.csv and validation.csv (or .tsv, .json, .jsonl, .parquet), or a name.

    The folder gets model.onnx, model.safetensors, manifest.json, metrics.json, report.html and
    search/, the experiment; for a HuggingFace model transformers/ as well, where its layers can be
    saved so.

    \b
    Examples:
      ray-nascomp compress task.py:make_task --max-drop 1% --max-latency 0.5x -o small
      ray-nascomp compress ./my-bert --data ./reviews --max-drop 1% --max-size 0.3x -o small
      ray-nascomp compress ./my-bert --data ./reviews --elastic --time 2h --prefer speedup -o small
    """
    from ray_nascomp import CostModel, compression_space
    from ray_nascomp.builders import gentle_config
    from ray_nascomp.schedulers import ParetoASHAScheduler
    from ray_nascomp.searchers import EvolutionarySearch

    check_folder(output / "search", resume)
    with working("loading the model and its data"):
        task = load_task(**source)
    limits = [limit for limit in (max_latency, max_size, max_params, max_macs) if limit is not None]
    if max_drop is not None:
        limits.insert(0, Constraint(f"{task.metric}_drop", "<=", max_drop))
    objectives = [Objective(task.metric, task.mode), Objective("speedup"), Objective("size_mb", "min")]
    goal = Goal(objectives, [*limits, *bounds])
    if prefer is not None and prefer not in (names := [objective.metric for objective in objectives]):
        raise ConfigError.unknown("prefer", prefer, names)
    effort = Effort(trials, epochs, workers or workers_by_default(), seconds, seed)
    costs, space = CostModel(task), compression_space(task, bits=bits)
    results = run_search(
        task,
        goal,
        space,
        EvolutionarySearch(goal, cost_model=costs, seed=seed, points_to_evaluate=[gentle_config(space)]),
        ParetoASHAScheduler(goal, max_t=epochs + 1, cost_model=costs),
        effort,
        output / "search",
        resume=resume,
    )
    results.report(output / "report.html")
    try:
        chosen = results.best(prefer)
    except ConfigError as error:
        raise nothing_found(results, str(error)) from error
    final_epochs = _REFINED * epochs if refine is None else refine
    if final_epochs:
        with redirect_stdout(sys.stderr):
            chosen = chosen.refine(final_epochs, task=task, folder=output / "refined")
    with working("measuring the chosen model"):
        measured = _measured(chosen, task)
        saved = _write(chosen, task, measured, output)
    if as_json:
        print_json(
            {
                "trial": chosen.trial_id,
                "config": chosen.config,
                "metrics": measured,
                "folder": str(output),
                "transformers": str(saved) if saved else None,
            }
        )
        return
    print_table(("", "original", "compressed", "gain"), _gains(measured, task), title=f"trial {chosen.trial_id}")
    click.echo(f"\n{output / 'model.onnx'}\n{output / 'report.html'}")


def _measured(chosen: SelectedModel, task: Task) -> dict[str, float]:
    """Figures on the test set, or on the validation set where there is none."""
    data = None if task.test_data is not None else task.val_data
    return chosen.evaluate(data, task=task)


def _write(chosen: SelectedModel, task: Task, measured: dict[str, float], output: Path) -> Path | None:
    """Writes the files; returns the folder that transformers loads, None if there is none."""
    chosen.export(output)
    (output / "metrics.json").write_text(json.dumps(measured, indent=1))
    save = getattr(task, "save_pretrained", None)
    if save is None:
        return None
    folder = output / "transformers"
    try:
        save(chosen.network(task=task), folder, measured)
    except ConfigError as error:
        # What was asked for, the exported model, is there.
        messages().print(f"no transformers/: {error}")
        return None
    return folder


def _gains(measured: dict[str, float], task: Task) -> list[tuple[str, str, str, str]]:
    name = task.metric
    where = "test" if task.test_data is not None else "validation"
    drop = measured[f"{name}_drop"]
    rows = [
        (
            f"{name} ({where} set)",
            f"{measured[f'{name}_original']:.4g}",
            f"{measured[name]:.4g}",
            f"{abs(drop):.4g} {'worse' if drop > 0 else 'better'}",
        ),
        (
            "size",
            f"{measured['size_mb_original']:.4g} MB",
            f"{measured['size_mb']:.4g} MB",
            f"{measured['size_ratio']:.1f}x smaller",
        ),
    ]
    for batch in (1, 32):
        rows.append(
            (
                f"latency, batch {batch}",
                f"{measured[f'latency_ms_original_batch_{batch}']:.4g} ms",
                f"{measured[f'latency_ms_batch_{batch}']:.4g} ms",
                f"{measured[f'speedup_batch_{batch}']:.1f}x faster",
            )
        )
    return rows
