"""A search read from a YAML or TOML file, every key checked before anything is loaded."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_nascomp.cli.limits import Aim, Bound, Duration
from ray_nascomp.cli.running import Effort, check_folder, workers_by_default
from ray_nascomp.cli.sources import load_task
from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Goal, Objective

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task

_KEYS = (
    "task", "output", "trials", "epochs", "workers", "time", "seed", "goal", "space", "set", "searcher", "scheduler",
)  # fmt: skip
_NO_SCHEDULER = "none"


@dataclass(frozen=True)
class DescribedSearch:
    """All that a file says, made into objects."""

    task: Task
    goal: Goal
    space: dict[str, Any]
    searcher: Any
    scheduler: Any
    effort: Effort
    folder: Path

    def dimensions(self) -> list[tuple[str, str]]:
        """Pairs (path, what it ranges over) of everything in the space."""
        from ray_nascomp.results.results import flat

        return [(path, describe(value)) for path, value in flat(self.space).items()]


def describe(value: Any) -> str:
    """A dimension for people: its choices, its bounds, or its constant value."""
    from ray.tune.search.sample import Categorical, Domain, Float, Integer

    if isinstance(value, Categorical):
        return "one of " + ", ".join(map(str, value.categories))
    if isinstance(value, (Float, Integer)):
        sampler = value.get_sampler()
        step = getattr(sampler, "q", None)
        scale = ", logarithmic" if "Log" in str(sampler.get_sampler() if step else sampler) else ""
        return f"{value.lower:g} to {value.upper:g}" + (f" in steps of {step:g}" if step else "") + scale
    return str(value) if isinstance(value, Domain) else f"{value} (fixed)"


def read_search(path: Path, resume: bool | None = None) -> DescribedSearch:
    """The search of a file.

    Args:
        path: The file.
        resume: Whether the output folder has to hold a search (True) or must not (False); None if
            it does not matter.

    Raises:
        ConfigError: If the file cannot be read, or a key or value in it is not allowed.
    """
    from ray_nascomp import CostModel, compression_space

    content = _parse(path)
    for key in content:
        if key not in _KEYS:
            raise ConfigError.unknown(f"{path.name}: key", key, _KEYS)
    makers = {kind: _maker(content, kind) for kind in ("searcher", "scheduler")}
    space_arguments = _table(content, "space")
    _check_arguments(compression_space, space_arguments, "space", given=("task",))
    goal_table = _table(content, "goal")
    for key in goal_table:
        if key not in ("objectives", "constraints"):
            raise ConfigError.unknown("goal", key, ("objectives", "constraints"))
    objectives = [_convert(Aim(), text, "goal.objectives") for text in goal_table.get("objectives", [])]
    constraints = [_convert(Bound(), text, "goal.constraints") for text in goal_table.get("constraints", [])]
    effort = Effort(
        _whole(content, "trials", 32, 1),
        _whole(content, "epochs", 3, 0),
        _whole(content, "workers", workers_by_default(), 1),
        _convert(Duration(), content["time"], "time") if "time" in content else None,
        content.get("seed"),
    )
    folder = path.parent / str(content.get("output", path.stem))
    if resume is not None:
        check_folder(folder, resume)
    task = _task(content, path.parent)
    goal = Goal(objectives or [Objective(task.metric, task.mode), Objective("speedup"), Objective("size_mb", "min")],
                constraints)  # fmt: skip
    space = compression_space(task, **space_arguments)
    for place, value in _table(content, "set").items():
        _set(space, place, value)
    costs = CostModel(task)
    make_searcher, searcher_arguments = makers["searcher"]
    searcher = make_searcher(goal, costs, **{"seed": effort.seed, **searcher_arguments})
    scheduler = None
    make_scheduler, scheduler_arguments = makers["scheduler"]
    if make_scheduler is not None:
        offered = {"max_t": effort.epochs + 1, "cost_model": costs}
        known = inspect.signature(make_scheduler).parameters
        defaults = {key: value for key, value in offered.items() if key in known}
        scheduler = make_scheduler(goal, **{**defaults, **scheduler_arguments})
    return DescribedSearch(task, goal, space, searcher, scheduler, effort, folder)


def _parse(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    content: Any
    try:
        if path.suffix == ".toml":
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            content = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            content = yaml.safe_load(text)
        else:
            raise ConfigError(f"{path}: a file that ends in .toml, .yaml or .yml is allowed")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a {type(content).__name__} was found, a table of keys is needed")
    return content


def _table(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: {value!r} was given, a table is allowed")
    return dict(value)


def _whole(content: Mapping[str, Any], key: str, default: int, least: int) -> int:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key}: {value!r} was given, a whole number from {least} is allowed")
    return value


def _convert(kind: click.ParamType, value: Any, key: str) -> Any:
    try:
        return kind.convert(value, None, None)
    except click.BadParameter as error:
        raise ConfigError(f"{key}: {error.message}") from error


def _task(content: Mapping[str, Any], folder: Path) -> Task:
    described = content.get("task")
    if isinstance(described, str):
        described = {"function": described}
    if not isinstance(described, dict) or not ({"function", "model"} & set(described)):
        raise ConfigError(
            f"task: {described!r} was given; allowed: 'file.py:function', or a table with model, data and further "
            "arguments of HuggingFaceTask"
        )
    arguments = dict(described)
    source = str(arguments.pop("function", None) or arguments.pop("model"))
    place, colon, name = source.partition(":")
    if (folder / place).exists():
        source = f"{folder / place}{colon}{name}"
    data = arguments.get("data")
    if isinstance(data, str) and (folder / data).exists():
        arguments["data"] = str(folder / data)
    try:
        return load_task(source, **arguments)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise ConfigError(f"task: {error}") from error
        raise


def _maker(content: Mapping[str, Any], kind: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class that a table names, and its arguments."""
    import ray_nascomp.schedulers
    import ray_nascomp.searchers

    value = content.get(kind)
    table = {"name": value} if isinstance(value, str) else _table(content, kind)
    makers: dict[str, Any]
    if kind == "searcher":
        from ray.tune.search import SEARCH_ALG_IMPORT

        makers = {
            name.removeprefix("nascomp_"): make()
            for name, make in SEARCH_ALG_IMPORT.items()
            if name.startswith("nascomp_")
        }
        name = table.pop("name", "evolutionary")
        given: tuple[str, ...] = ("goal", "cost_model")
    else:
        from ray.tune.schedulers import SCHEDULER_IMPORT

        own = {getattr(ray_nascomp.schedulers, name) for name in ray_nascomp.schedulers.__all__}
        makers = {name: cls for name, cls in SCHEDULER_IMPORT.items() if isinstance(cls, type) and cls in own}
        makers[_NO_SCHEDULER] = None
        name = table.pop("name", "pareto_asha")
        given = ("goal", "cost_model", "max_t")
    if name not in makers:
        raise ConfigError.unknown(f"{kind}.name", name, sorted(makers))
    if makers[name] is not None:
        _check_arguments(makers[name], table, kind, given)
    return makers[name], table


def _check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], key: str, given: tuple[str, ...]
) -> None:
    allowed = [name for name in inspect.signature(function).parameters if name not in given]
    for name in arguments:
        if name not in allowed:
            raise ConfigError.unknown(key, name, allowed)


def _set(space: dict[str, Any], place: str, value: Any) -> None:
    from ray import tune

    from ray_nascomp.results.results import flat

    *stages, last = place.split("/")
    inner: Any = space
    for stage in stages:
        inner = inner.get(stage) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or (last not in inner and stages and stages[-1] in ("sparsity", "bits")):
        raise ConfigError.unknown("set", place, flat(space))
    if isinstance(value, dict):
        raise ConfigError(f"set: {place} = {value!r} was given; a value or a list to choose from is allowed")
    inner[last] = tune.choice(value) if isinstance(value, list) else value
