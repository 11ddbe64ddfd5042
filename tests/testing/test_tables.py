from __future__ import annotations

import pytest
from ray import tune

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.searchers import EvolutionarySearch
from ray_nascomp.testing.tables import table_function, table_trainable

GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("size", "min")])


def curve(config):
    return [{"accuracy": config["x"] * step / 4, "size": config["x"] ** 2} for step in range(1, 5)]


def test_a_class_trial_ends_without_a_doubled_row_and_resumes_where_it_was():
    trainable = table_trainable(curve)(config={"x": 0.5})
    rows = [trainable.step() for _ in range(5)]
    assert [row.get("final") for row in rows] == [False, False, False, True, None]
    assert rows[3]["accuracy"] == 0.5
    assert rows[4] == {"__duplicate__": True, "done": True}
    assert trainable.reset_config({"x": 1.0})
    trainable.load_checkpoint({"position": 3})
    assert trainable.step() == {"accuracy": 1.0, "size": 1.0, "final": True}


def test_an_empty_curve_is_named():
    with pytest.raises(ConfigError, match="look_up: no step"):
        table_trainable(lambda config: [])(config={"x": 1})


@pytest.mark.parametrize("wrap", [table_function, table_trainable])
def test_tune_runs_both_forms_to_their_last_row(ray_session, tmp_path, wrap):
    tuner = tune.Tuner(
        wrap(curve),
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(GOAL, seed=0), num_samples=8, max_concurrent_trials=2, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="table", verbose=0),
    )
    results = tuner.fit()
    assert len(results) == 8
    for result in results:
        assert result.metrics["training_iteration"] >= 4
        assert result.metrics["accuracy"] == pytest.approx(result.config["x"])
