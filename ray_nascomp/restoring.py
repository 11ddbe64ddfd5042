"""Going on with a search after its driver has died: Tune's own restore, and what it does not do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs
from ray import cloudpickle, tune

from ray_nascomp.errors import ConfigError
from ray_nascomp.observation_log import ObservationLog, snapshot_statuses
from ray_nascomp.recorded import new_run

logger = logging.getLogger(__name__)

_TUNER_FILE = "tuner.pkl"


def restore(
    path: str,
    trainable: Any,
    *,
    param_space: Mapping[str, Any] | None = None,
    storage_filesystem: pyarrow.fs.FileSystem | None = None,
    **options: Any,
) -> tune.Tuner:
    """`tune.Tuner.restore` that loses nothing, wherever the folder lies now.

    Beyond Tune's own: a folder with results of another task, goal or number of epochs is refused
    before any trial runs; after the folder was moved, new trials go to the new place; where Tune's
    snapshot is missing, damaged or torn, the search starts anew and answers from the observation
    log whatever has been reported.

    Like Tune's, it runs what the folder's pickles contain: restore only what you trust.

    Args:
        path: The experiment's folder, a local path or a URI.
        trainable: The same trainable as before, such as `compression_trainable(...)`.
        param_space: The same search space; needed only if Tune's snapshot is damaged.
        storage_filesystem: See `tune.Tuner.restore`.
        options: Further options of `tune.Tuner.restore`, such as `restart_errored`.

    Raises:
        ConfigError: If the folder holds no experiment, or results of something else.
    """
    folder = _Folder.of(path, storage_filesystem)
    if not folder.exists(_TUNER_FILE):
        raise ConfigError(f"path: {path!r} was given, the folder of an experiment is allowed: it has no {_TUNER_FILE}")
    identity = getattr(trainable, "identity", None)
    if identity is not None:
        folder.log.claim(identity)
    if hasattr(trainable, "run"):
        trainable.run = new_run()
    generator = _whole_snapshot(folder)
    if generator is None:
        return _start_anew(folder, path, trainable, param_space, storage_filesystem)
    _point_new_trials_here(folder, generator)
    space = dict(param_space) if param_space is not None else None
    return tune.Tuner.restore(
        path, trainable=trainable, param_space=space, storage_filesystem=storage_filesystem, **options
    )


@dataclass(frozen=True)
class _Folder:
    filesystem: pyarrow.fs.FileSystem
    path: str

    @classmethod
    def of(cls, path: str, filesystem: pyarrow.fs.FileSystem | None) -> _Folder:
        if filesystem is not None:
            return cls(filesystem, str(path).rstrip("/"))
        found, inner = pyarrow.fs.FileSystem.from_uri(_absolute(path))
        return cls(found, inner.rstrip("/"))

    @property
    def log(self) -> ObservationLog:
        return ObservationLog(self.filesystem, self.path)

    def exists(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(f"{self.path}/{name}").type == pyarrow.fs.FileType.File)

    def newest(self, prefix: str) -> str | None:
        """Name of the newest file that starts so; Tune puts a sortable time behind it."""
        entries = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, allow_not_found=True))
        names = [PurePosixPath(entry.path).name for entry in entries]
        return max((name for name in names if name.startswith(prefix)), default=None)

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(content)


def _whole_snapshot(folder: _Folder) -> dict[str, Any] | None:
    """The state of Tune's generator of trials, if it, snapshot and searcher are whole and of one moment; else None."""
    names = [folder.newest(prefix) for prefix in ("experiment_state-", "search_gen_state-", "searcher-state-")]
    if names[0] is None:
        return None
    statuses = snapshot_statuses(folder.read(names[0]).decode(errors="replace"))
    if not statuses:
        return None
    if names[1] is None:  # Tune's own generators of trials keep none.
        return {}
    try:
        generator = cloudpickle.loads(folder.read(names[1]))
        if names[2] is not None and not _is_whole_state(folder.read(names[2])):
            return None
    except Exception as error:  # A pickle cut short raises nearly anything.
        logger.warning("Tune's snapshot in %s is damaged: %s", folder.path, error)
        return None
    running = [s.get("live_trials", ()) for s in generator.values() if isinstance(s, dict)]
    if generator.get("counter") != len(statuses) or not {t for live in running for t in live} <= set(statuses):
        logger.warning("Tune's snapshot in %s is torn: its parts are of different moments", folder.path)
        return None
    return dict(generator)


def _is_whole_state(content: bytes) -> bool:
    """Whether a state of our searchers ends with its tail; one of another kind counts as whole unless it is empty."""
    if not content.startswith(b"{"):
        return bool(content)
    return content.endswith(b"\n") and content.splitlines()[-1].startswith(b'{"tail"')


def _point_new_trials_here(folder: _Folder, generator: dict[str, Any]) -> None:
    """Tune moves the trials that it knows to a new folder, but would start new ones in the old."""
    experiment = generator.get("experiment")
    if experiment is None or experiment.storage.experiment_fs_path == folder.path:
        return
    place = PurePosixPath(folder.path)
    for storage in (experiment.storage, experiment.spec["storage"]):
        storage.storage_filesystem = folder.filesystem
        storage.storage_fs_path = str(place.parent)
        storage.experiment_dir_name = place.name
    name = folder.newest("search_gen_state-")
    assert name is not None
    folder.write(name, cloudpickle.dumps(generator))


def _start_anew(
    folder: _Folder,
    path: str,
    trainable: Any,
    param_space: Mapping[str, Any] | None,
    filesystem: pyarrow.fs.FileSystem | None,
) -> tune.Tuner:
    """The search from its beginning, with its old settings, in the same folder, and answered from the log."""
    records = folder.log.records()
    logger.warning("%s is restored from its observation log: %d trials", folder.path, len(records))
    settings = cloudpickle.loads(folder.read(_TUNER_FILE))
    tune_config, run_config = settings["_tune_config"], settings["_run_config"]
    space = param_space if param_space is not None else _known_space(folder)
    if space is None:
        raise ConfigError("param_space: none was given, and Tune's snapshot is too damaged to hold it: give the same")
    searcher = tune_config.search_alg
    while hasattr(searcher, "searcher"):
        searcher = searcher.searcher
    take_up: Callable[[Any], None] | None = getattr(searcher, "take_up", None)
    if take_up is not None:
        take_up(records)
    place, mark, query = (_absolute(path) if filesystem is None else path).partition("?")
    parent, _, run_config.name = place.rstrip("/").rpartition("/")
    run_config.storage_path, run_config.storage_filesystem = parent + mark + query, filesystem
    return tune.Tuner(trainable, param_space=dict(space), tune_config=tune_config, run_config=run_config)


def _known_space(folder: _Folder) -> Mapping[str, Any] | None:
    name = folder.newest("search_gen_state-")
    try:
        space: Mapping[str, Any] = cloudpickle.loads(folder.read(name or ""))["experiment"].spec["config"]
    except Exception:  # As above.
        return None
    return space


def _absolute(path: str) -> str:
    return str(path).rstrip("/") if "://" in str(path) else str(Path(path).expanduser().resolve())
