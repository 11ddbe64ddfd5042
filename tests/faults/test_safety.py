from __future__ import annotations

import json
import pickle

import pytest

import ray_nascomp as nc
from ray_nascomp.searchers.state import read_state

GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("size", "min")])


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a stranger's pickle was run')",))


@pytest.fixture
def hostile_folder(tmp_path):
    """Results from a stranger: pickles everywhere, and a script in every text."""
    script = "<script>alert(1)</script>"
    for name in ("tuner.pkl", "search_gen_state-1.json", "searcher-state-1.pkl", "experiment_state-1.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for number in range(3):
        trial = tmp_path / f"trial_{number}"
        (trial / "checkpoint_000000").mkdir(parents=True)
        (trial / "checkpoint_000000" / "model.onnx").write_bytes(pickle.dumps(Bomb()))
        (trial / "error.pkl").write_bytes(pickle.dumps(Bomb()))
        (trial / "params.json").write_text(json.dumps({script: script, "x": number}))
        row = {"accuracy": number / 3, "size": number, "final": number < 2, "trial_id": f"{number}", "reason": script}
        (trial / "result.json").write_text(json.dumps(row))
    (tmp_path / "trial_2" / "error.txt").write_text(script)
    return tmp_path


def test_a_strangers_results_are_read_without_running_them(hostile_folder):
    results = nc.Results(hostile_folder, GOAL)
    assert sorted(trial.status for trial in results.trials) == ["completed", "completed", "failed"]
    assert len(results.dataframe()) == 3
    assert results.best("accuracy").metrics["accuracy"] == pytest.approx(1 / 3)


def test_the_report_escapes_what_comes_from_configs_and_errors(hostile_folder):
    report = nc.Results(hostile_folder, GOAL).report(hostile_folder / "report.html").read_text()
    assert "alert(1)" in report
    assert "<script>alert" not in report


def test_a_searchers_state_is_read_as_text(hostile_folder):
    with pytest.raises(nc.ConfigError, match="is not a searcher's state"):
        read_state(hostile_folder / "searcher-state-1.pkl")
