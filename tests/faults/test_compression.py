from __future__ import annotations

import os
from pathlib import Path

import pytest
from ray import tune

import ray_nascomp as nc
from ray_nascomp.searchers import EvolutionarySearch

GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("size_mb", "min")])
NOT_THE_TRIALS = {"trial_id", "timestamp", "date", "pid", "experiment_tag", "checkpoint_dir_name"}


def reports(results):
    """By config: every report without what Tune adds of time and place."""
    return {
        str(trial.config): [
            {k: v for k, v in row.items() if k not in NOT_THE_TRIALS and "time_" not in k and "since_restore" not in k}
            for row in trial.rows
        ]
        for trial in results.trials
    }


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_search_without_its_snapshot_is_answered_from_the_log_with_its_files(ray_session, digits_task, tmp_path):
    trainable = nc.compression_trainable(digits_task, GOAL, epochs=1, time_limit_s=600)
    space = nc.compression_space(digits_task)
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(GOAL, nc.CostModel(digits_task), seed=0),
            num_samples=3,
            max_concurrent_trials=2,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="run", verbose=0),
    )
    before = nc.Results(tuner.fit())
    for path in (tmp_path / "run").glob("experiment_state-*.json"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(nc.ConfigError, match="epochs: 2 was given"):
        nc.restore(str(tmp_path / "run"), nc.compression_trainable(digits_task, GOAL, epochs=2))
    after = nc.Results(nc.restore(str(tmp_path / "run"), trainable).fit())
    assert len(after) == len(before) == 3
    # Times were not taken again: equal to the last digit, they were not measured twice.
    assert reports(after) == reports(before)
    for trial in after.trials:
        assert {"model.onnx", "model.safetensors", "manifest.json"} == set(os.listdir(trial.checkpoint))
        assert (Path(trial.checkpoint) / "model.onnx").stat().st_size == round(trial.metrics["size_mb"] * 1e6)
