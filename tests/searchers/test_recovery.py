from __future__ import annotations

import json
import logging

import pyarrow.fs
import pytest
from ray.tune.search import Searcher

from ray_nascomp.errors import ConfigError
from ray_nascomp.observation_log import ObservationLog, Record
from ray_nascomp.observations import Observation
from ray_nascomp.searchers import EvolutionarySearch
from ray_nascomp.searchers.recovery import plan_recovery
from ray_nascomp.searchers.state import read_state
from ray_nascomp.testing.problems import mixed
from ray_nascomp.testing.searchers import run_search

PROBLEM = mixed()
STATE = Searcher.CKPT_FILE_TMPL.format("2026-01-01_00-00-00")


def searcher(seed=3):
    return EvolutionarySearch(PROBLEM.goal, PROBLEM.known, seed=seed)


def save(source, folder, statuses):
    """What Tune leaves behind: the searcher's state and its own snapshot."""
    source.save(str(folder / STATE))
    trials = [[json.dumps({"trial_id": trial_id, "status": status}), "{}"] for trial_id, status in statuses.items()]
    (folder / "experiment_state-2026-01-01_00-00-00.json").write_text(json.dumps({"trial_data": trials}))


def log_trials(source, folder, first=0):
    log = ObservationLog(pyarrow.fs.LocalFileSystem(), str(folder))
    for observation in source.observations[first:]:
        log.write(Record(observation.config, observation.trial_id, reports={1: {**observation.metrics, "done": True}}))


def configs(source):
    return [dict(observation.config) for observation in source.observations]


def restored(folder):
    fresh = searcher(seed=99)
    fresh.restore_from_dir(str(folder))
    return fresh


def test_trials_that_the_snapshot_lost_are_suggested_again_in_their_order(tmp_path):
    whole = searcher()
    run_search(whole, PROBLEM, 14)
    save(whole, tmp_path, {f"trial{i}": "TERMINATED" for i in range(14)})
    run_search(whole, PROBLEM, 6, first=14)
    log_trials(whole, tmp_path)
    again = restored(tmp_path)
    assert configs(again) == configs(whole)[:14]
    assert not list(tmp_path.glob("observation-*"))
    run_search(again, PROBLEM, 10, first=20)
    run_search(whole, PROBLEM, 4, first=20)
    assert configs(again) == configs(whole)


def test_lost_trials_of_a_parallel_search_come_before_anything_new(tmp_path):
    whole = searcher()
    run_search(whole, PROBLEM, 12)
    save(whole, tmp_path, {f"trial{i}": "TERMINATED" for i in range(12)})
    run_search(whole, PROBLEM, 6, first=12, parallel=3)
    log_trials(whole, tmp_path)
    again = restored(tmp_path)
    run_search(again, PROBLEM, 6, first=30, parallel=2)
    key = again.key
    assert {key(c) for c in configs(again)} == {key(c) for c in configs(whole)}


def test_a_trial_that_ended_for_tune_alone_is_told_from_the_log(tmp_path):
    whole = searcher()
    run_search(whole, PROBLEM, 8)
    save(whole, tmp_path, {f"trial{i}": "TERMINATED" for i in range(9)} | {"trial9": "ERROR"})
    run_search(whole, PROBLEM, 2, first=8)
    log_trials(whole, tmp_path)
    again = restored(tmp_path)
    assert configs(again) == configs(whole)
    assert again.observations[8].metrics["accuracy"] == whole.observations[8].metrics["accuracy"]
    assert [o.status.value for o in again.observations[8:]] == ["completed", "failed"]


def test_the_three_sources_are_compared_by_trial():
    def entry(trial_id):
        return Record({"x": trial_id}, trial_id, reports={1: {"accuracy": 1.0}})

    plan = plan_recovery(
        records=[entry("told twice"), entry("ended"), entry("runs"), entry("unknown to tune")],
        statuses={"ended": "TERMINATED", "runs": "PENDING", "told": "TERMINATED"},
        observations=[Observation("told twice", {}), Observation("told", {}), Observation("an earlier search's", {})],
        pending={"never reported": {"x": 0}},
    )
    assert plan.forget == {"told twice", "never reported"}
    assert plan.resume == {"runs": {"x": "runs"}}
    assert [(record.trial_id, is_error) for record, is_error in plan.complete] == [("ended", False)]
    assert plan.lost == [{"x": "told twice"}, {"x": "unknown to tune"}, {"x": 0}]


def test_a_state_cut_at_every_byte_of_its_last_records_restores_to_the_last_whole_one(tmp_path):
    whole = searcher()
    run_search(whole, PROBLEM, 9)
    whole.save(str(tmp_path / STATE))
    content = (tmp_path / STATE).read_bytes()
    lines = content.splitlines(keepends=True)
    ends = [sum(map(len, lines[: n + 1])) - 1 for n in range(len(lines))]
    cut = tmp_path / "cut"
    for length in range(ends[-3], len(content)):
        cut.write_bytes(content[:length])
        kept = sum(end <= length for end in ends[1:-1])
        _, observations, tail = read_state(cut)
        assert len(observations) == kept
        assert bool(tail) == (length >= ends[-1])
    for length in (ends[-3], ends[-2] - 1, ends[-2], len(content) - 5):
        cut.write_bytes(content[:length])
        again = searcher(seed=1)
        again.restore(str(cut))
        kept = sum(end <= length for end in ends[1:-1])
        assert configs(again) == configs(whole)[:kept]
        assert len(run_search(again, PROBLEM, 5, first=20)) == 5


def test_a_state_without_a_whole_line_gives_way_to_an_earlier_one(tmp_path, caplog):
    whole = searcher()
    run_search(whole, PROBLEM, 4)
    whole.save(str(tmp_path / STATE))
    (tmp_path / Searcher.CKPT_FILE_TMPL.format("2026-01-02_00-00-00")).write_text('{"head": {"spa')
    with caplog.at_level(logging.WARNING):
        assert configs(restored(tmp_path)) == configs(whole)
    assert "an earlier one is taken" in caplog.text
    (tmp_path / STATE).unlink()
    with pytest.raises(RuntimeError, match="no state"):
        restored(tmp_path)
    with pytest.raises(ConfigError, match="cut short in its first line"):
        read_state(tmp_path / Searcher.CKPT_FILE_TMPL.format("2026-01-02_00-00-00"))
