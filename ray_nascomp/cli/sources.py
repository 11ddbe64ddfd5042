"""The task that a command works on: a function in a Python file, or a HuggingFace model with a data set."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task

_Command = TypeVar("_Command", bound=Callable[..., Any])
_TABLES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
# What the kinds of models look at, for `inspect`, where there are no data: tokens, seconds at 16 kHz.
_TOKENS = 32
_SAMPLES = 16_000


def source_options(command: _Command) -> _Command:
    """The argument SOURCE and the options that go with it."""
    for option in reversed(
        (
            click.argument("source"),
            click.option("--data", help="Data of a HuggingFace model: a folder or a name; see the end."),
            click.option("--kind", help="What the HuggingFace model does, such as text_classification."),
            click.option("--max-length", type=click.IntRange(1), help="Tokens of a text, samples of a recording."),
            click.option("--elastic", is_flag=True, help="Search depth, heads and widths of the transformer as well."),
            click.option(
                "--finetune", "finetune_epochs", type=click.IntRange(0), default=0, help="Train the model first."
            ),
        )
    ):
        command = option(command)
    return command


def load_task(
    source: str,
    data: Any = None,
    kind: str | None = None,
    max_length: int | None = None,
    elastic: bool = False,
    finetune_epochs: int = 0,
    **more: Any,
) -> Task:
    """The task of a source.

    Args:
        source: "file.py:function" or "package.module:function", a function without arguments that
            returns a `Task`; or a HuggingFace model, by folder or name.
        data: Data of a HuggingFace model: a folder that `datasets` saved, a folder with files
            train.csv, validation.csv and test.csv (or .tsv, .json, .jsonl, .parquet), or a name.
        kind: As for `HuggingFaceTask`.
        max_length: As for `HuggingFaceTask`.
        elastic: Whether the transformer's architecture is searched.
        finetune_epochs: Epochs for which the model is trained before anything else.
        **more: Further arguments of `HuggingFaceTask`.

    Raises:
        ConfigError: If there is no such task.
    """
    is_function = ":" in source and not Path(source).exists()
    if is_function:
        given = {"data": data, "kind": kind, "max_length": max_length, "elastic": elastic, **more}
        unfit = [name for name, value in given.items() if value]
        if unfit or finetune_epochs:
            raise ConfigError(f"{(unfit or ['finetune'])[0]}: only for a HuggingFace model, {source} is a function")
        return _from_function(source)
    if source.endswith(".py"):
        raise ConfigError(f"source: {source!r} was given; the function is missing, as in {source}:make_task")
    if data is None:
        raise ConfigError("data: none was given; a HuggingFace model needs some, as in --data FOLDER")
    _check_model(source)
    from transformers.utils import logging as transformers_logging

    from ray_nascomp.tasks.huggingface import HuggingFaceTask

    transformers_logging.disable_progress_bar()
    task = HuggingFaceTask(source, _dataset(data), kind=kind, max_length=max_length, **more)
    if finetune_epochs:
        task = task.finetune(num_train_epochs=finetune_epochs)
    return task.elastic() if elastic else task


def load_structure(source: str, kind: str | None = None, **options: Any) -> Task:
    """A task whose model alone matters; a HuggingFace model needs no data for it.

    Raises:
        ConfigError: If there is no such task, or inputs for the model cannot be made up.
    """
    if options.get("data") is not None or ":" in source or source.endswith(".py"):
        return load_task(source, kind=kind, **options)
    _check_model(source)
    import torch
    from transformers import AutoConfig

    from ray_nascomp.tasks.huggingface import HuggingFaceTask

    config = AutoConfig.from_pretrained(source)
    name = (config.architectures or [""])[0].lower()
    length = options.get("max_length")
    if "image" in name or hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        inputs = torch.zeros(2, getattr(config, "num_channels", 3), size, size)
    elif hasattr(config, "conv_stride"):
        inputs = torch.zeros(2, length or _SAMPLES)
    elif hasattr(config, "vocab_size"):
        inputs = torch.ones(2, length or _TOKENS, dtype=torch.long)
    else:
        raise ConfigError(f"data: none was given, and inputs for {source} cannot be made up; give --data")
    split = (inputs, torch.zeros(2, dtype=torch.long))
    task = HuggingFaceTask(source, {"train": split, "validation": split}, kind=kind)
    return task.elastic() if options.get("elastic") else task


def _check_model(source: str) -> None:
    """Checks that a path leads to a model; keeps its library from drawing bars of its own."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    path = Path(source)
    looks_like_a_path = path.is_absolute() or source.startswith((".", "~"))
    if looks_like_a_path and not (path.expanduser() / "config.json").is_file():
        raise ConfigError(f"source: {source} is not the folder of a HuggingFace model, it has no config.json")


def _from_function(source: str) -> Task:
    from ray_nascomp.tasks.base import Task

    place, name = source.rsplit(":", 1)
    folder = os.getcwd()
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"source: there is no file {place}")
        folder, place = str(path.parent), path.stem
    # Workers import the file as well, whatever they unpickle from it.
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place:
            raise
        raise ConfigError(f"source: there is no module {place}") from error
    function = getattr(module, name, None)
    if not callable(function):
        callables = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ConfigError.unknown(f"function of {place}", name, callables)
    task = function()
    if not isinstance(task, Task):
        raise ConfigError(f"source: {source} returned a {type(task).__name__}, a ray_nascomp.Task is needed")
    return task


def _dataset(data: Any) -> Any:
    """A data set of tables in a folder; anything else as it is."""
    if isinstance(data, Mapping) or not Path(str(data)).is_dir():
        return data
    folder = Path(data)
    files: dict[str, Path] = {}
    for split, names in _SPLITS.items():
        for name in names:
            for suffix in _TABLES:
                if (folder / f"{name}{suffix}").is_file():
                    files.setdefault(split, folder / f"{name}{suffix}")
    if "train" not in files:
        return data
    if "validation" not in files:
        raise ConfigError(f"data: {folder} has {files['train'].name}, but no validation{files['train'].suffix}")
    import datasets

    format_name = _TABLES[files["train"].suffix]
    options = {"sep": "\t"} if files["train"].suffix == ".tsv" else {}
    return datasets.load_dataset(format_name, data_files={k: str(v) for k, v in files.items()}, **options)
