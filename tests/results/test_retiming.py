from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from results.test_results import row, write_trial

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.pipeline import measure


def measured_trial(folder: Path, name: str, task: nc.Task, goal: nc.Goal, config: dict, **wrong) -> dict:
    """A completed trial with its files, in whose last report some values are other than they were measured."""
    step = nc.compress(task, config, goal=goal, epochs=0)
    reported = {**step.metrics, **wrong}
    step.save(write_trial(folder, name, [reported], config) / "checkpoint_000000")
    return reported


@pytest.fixture
def beside_others(digits_task, tmp_path):
    """Of two trials one was timed as ten times slower than it can be, and is beyond the limit."""
    goal = nc.Goal([nc.Objective("accuracy"), nc.Objective("speedup")], [nc.Constraint("speedup", ">=", 0.2)])
    slowed = measured_trial(tmp_path, "slowed", digits_task, goal, {})
    wrong = {**slowed, "speedup": 0.1, "latency_ms": 1e3}
    (tmp_path / "slowed" / "result.json").write_text(
        json.dumps({**wrong, "score": goal.score(wrong), "trial_id": "slowed"})
    )
    measured_trial(tmp_path, "free", digits_task, goal, {"prune": {"sparsity": 0.5}})
    write_trial(tmp_path, "stopped", [{"final": False, "speedup": 0.1, "goal": goal.to_json()}])
    return nc.Results(tmp_path)


def test_results_are_timed_again_alone(beside_others, digits_task):
    def of(results, metric):
        return {trial.trial_id: trial.metrics.get(metric) for trial in results.trials}

    assert "slowed" not in {trial.trial_id for trial in beside_others.front()}
    before = {name: of(beside_others, name) for name in ("accuracy", "size_mb", "speedup")}
    beside_others.retime(digits_task, progress=False)
    slowed = next(trial for trial in beside_others.trials if trial.trial_id == "slowed")
    # It is the original, unchanged, timed next to itself.
    assert slowed.metrics["speedup"] == pytest.approx(1, abs=0.4)
    assert slowed.metrics["latency_ms"] < 100
    assert slowed.metrics["score"] == beside_others.goal.score(slowed.metrics) > 0
    assert beside_others.best("accuracy").trial_id == "slowed"
    assert of(beside_others, "speedup")["stopped"] == before["speedup"]["stopped"]
    completed = ("slowed", "free")
    for name in ("accuracy", "size_mb"):
        assert [of(beside_others, name)[trial] for trial in completed] == [before[name][trial] for trial in completed]
    # Whoever opens the folder later has the new figures too.
    assert of(nc.Results(beside_others.path), "speedup") == of(beside_others, "speedup")


def test_timing_again_needs_the_searches_own_task_and_files(beside_others, digits, digits_task, caplog):
    other = nc.Task(digits_task.model, digits["train"], digits["test"])
    with pytest.raises(ConfigError, match="another task"):
        beside_others.retime(other, progress=False)
    shutil.rmtree(Path(beside_others.path) / "free" / "checkpoint_000000")
    results = nc.Results(beside_others.path)
    results.retime(digits_task, progress=False)
    assert "1 of 2 completed trials have no file" in caplog.text
    assert results.best("accuracy").trial_id == "slowed"
    shutil.rmtree(Path(beside_others.path) / "slowed" / "checkpoint_000000")
    with pytest.raises(ConfigError, match="none of 2 completed trials has kept a file"):
        nc.Results(beside_others.path).retime(digits_task, progress=False)


def test_what_was_timed_before_an_interruption_is_kept_beside_the_rest(beside_others, digits_task, monkeypatch):
    beside_others.retime(digits_task, progress=False)
    first = {trial.trial_id: trial.metrics["speedup"] for trial in beside_others.trials}
    real, calls = measure.latency_of, []

    def interrupted(content, task):
        calls.append(task)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(content, task)

    monkeypatch.setattr(measure, "latency_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        beside_others.retime(digits_task, progress=False)
    again = {trial.trial_id: trial.metrics["speedup"] for trial in nc.Results(beside_others.path).trials}
    assert again == {trial.trial_id: trial.metrics["speedup"] for trial in beside_others.trials}
    assert [name for name in again if again[name] != first[name]] == [beside_others.trials[0].trial_id]


def test_times_of_other_nodes_are_not_replaced_by_this_machines(digits_task, tmp_path):
    goal = nc.Goal([nc.Objective("accuracy")])
    measured_trial(tmp_path, "edge", digits_task, goal, {}, timed_elsewhere=True)
    with pytest.raises(ConfigError, match="latency_resources"):
        nc.Results(tmp_path).retime(digits_task, progress=False)


def test_a_score_of_the_trainables_own_stays(digits_task, tmp_path):
    goal = nc.Goal([nc.Objective("accuracy"), nc.Objective("speedup")])
    measured_trial(tmp_path, "own", digits_task, goal, {}, score=43.0)
    results = nc.Results(tmp_path, nc.Goal([nc.Objective("size_mb", "min")]))
    results.retime(digits_task, progress=False)
    assert results.trials[0].metrics["score"] == 43.0


def test_without_completed_trials_nothing_is_timed(tmp_path):
    write_trial(tmp_path, "stopped", [row(0.5, 1.0, final=False)])
    nc.Results(tmp_path).retime()
    assert not (tmp_path / "latency.jsonl").exists()


@pytest.mark.parametrize("text", ['{"trial_id": "slowed", "times": {"spee', "[1]", '{"trial_id": "slowed"}', ""])
def test_a_record_of_new_times_that_cannot_be_read_is_as_none(beside_others, text):
    before = beside_others.dataframe()
    (Path(beside_others.path) / "latency.jsonl").write_text(text)
    assert nc.Results(beside_others.path).dataframe().equals(before)
