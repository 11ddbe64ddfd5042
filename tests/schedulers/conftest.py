from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
from ray.tune.experiment import Trial


@pytest.fixture
def restored(tmp_path) -> Callable[..., Any]:
    """Makes trials of a restored experiment, whose reports are in their folders."""

    def make(name: str, rows: Sequence[dict[str, Any]], status: str = Trial.TERMINATED) -> SimpleNamespace:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        storage = SimpleNamespace(
            trial_dir_name=name, trial_fs_path=str(folder), storage_filesystem=pyarrow.fs.LocalFileSystem()
        )
        return SimpleNamespace(trial_id=name, last_result=rows[-1], storage=storage, status=status, config={})

    return make
