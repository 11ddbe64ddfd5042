from __future__ import annotations

import json
import logging

import pyarrow.fs
import pytest

from ray_nascomp.errors import ConfigError
from ray_nascomp.observation_log import ObservationLog, Record, snapshot_statuses, take_records

CONFIG = {"prune": {"sparsity": 0.5}, "quantize": {"bits": 8}}


def log(path):
    return ObservationLog(pyarrow.fs.LocalFileSystem(), str(path))


def record(**changes):
    values = {"config": CONFIG, "trial_id": "a", "reports": {1: {"accuracy": 0.5}, 2: {"accuracy": 0.7, "final": True}}}
    return Record(**{**values, **changes})


def test_what_is_written_is_read_and_replaced_whole(tmp_path):
    log(tmp_path).write(record(reports={1: {"accuracy": 0.5}}))
    first = log(tmp_path).read(CONFIG)
    assert not first.is_ended
    log(tmp_path).write(record(checkpoint="trial/checkpoint_000000", checkpoint_iteration=2))
    known = log(tmp_path).read({"quantize": {"bits": 8}, "prune": {"sparsity": 0.5}})
    assert known.reports == {1: {"accuracy": 0.5}, 2: {"accuracy": 0.7, "final": True}}
    assert known.is_ended
    assert known.checkpoint == "trial/checkpoint_000000"
    assert log(tmp_path).read({**CONFIG, "quantize": {"bits": 4}}) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_an_object_store_is_written_without_renaming():
    fsspec = pytest.importorskip("fsspec")
    memory = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("memory")))
    memory.create_dir("bucket/run")
    store = ObservationLog(memory, "bucket/run")
    store.write(record(config={"x": 1}, time=1.0))
    store.write(record(config={"x": 2}, trial_id="b", time=2.0))
    store.write(record(config={"x": 1}, reports={1: {"accuracy": 0.9}}, time=3.0))
    assert [(entry.trial_id, entry.time) for entry in store.records()] == [("b", 2.0), ("a", 3.0)]
    assert store.read({"x": 1}).reports == {1: {"accuracy": 0.9}}
    store.claim({"task": "a"})
    with pytest.raises(ConfigError, match="task: 'b' was given"):
        store.claim({"task": "b"})


def test_a_record_cut_anywhere_is_passed_over_and_the_others_are_read(tmp_path):
    log(tmp_path).write(record(config={"x": 1}, trial_id="whole", time=1.0))
    log(tmp_path).write(record(time=2.0))
    path = next(path for path in tmp_path.iterdir() if '"a"' in path.read_text())
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert [entry.trial_id for entry in log(tmp_path).records()] == ["whole"]
        assert log(tmp_path).read(CONFIG) is None
    path.write_bytes(content)
    assert [entry.trial_id for entry in log(tmp_path).records()] == ["whole", "a"]


@pytest.mark.parametrize("checkpoint", ["/etc", "../elsewhere", "trial/../../up"])
def test_a_path_out_of_the_folder_is_refused(checkpoint):
    assert Record.from_json(record(checkpoint=checkpoint).to_json()) is None


def test_a_storage_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        log(tmp_path / "file").write(record())
    assert "the observation of trial a could not be logged" in caplog.text


def test_results_of_something_else_are_refused(tmp_path):
    log(tmp_path).claim({"task": "a", "epochs": 2})
    log(tmp_path).claim({"task": "a", "epochs": 2})
    with pytest.raises(ConfigError, match=r"epochs: 3 was given.*made with 2"):
        log(tmp_path).claim({"task": "a", "epochs": 3})


def test_local_copies_are_taken_away_so_that_tune_does_not_upload_them_again(tmp_path):
    log(tmp_path).write(record())
    (tmp_path / "experiment_state-1.json").write_text(json.dumps({}))
    assert [entry.trial_id for entry in take_records(tmp_path)] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["experiment_state-1.json"]


def test_a_snapshot_cut_anywhere_is_no_snapshot():
    trials = [[json.dumps({"trial_id": name, "status": "TERMINATED"}), "{}"] for name in ("a", "b")]
    text = json.dumps({"trial_data": trials, "runner_data": {}})
    assert snapshot_statuses(text) == {"a": "TERMINATED", "b": "TERMINATED"}
    assert all(snapshot_statuses(text[:length]) == {} for length in range(len(text)))
