from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError, MissingMetricError
from ray_nascomp.schedulers import ParetoASHAScheduler
from ray_nascomp.searchers import EvolutionarySearch

GOAL = nc.Goal(
    [nc.Objective("accuracy"), nc.Objective("speedup"), nc.Objective("size_mb", "min")],
    [nc.Constraint("accuracy_drop", "<=", 0.05)],
)


def run(trainable, space, folder, epochs=2, trials=4, **tune_config):
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=True, max_concurrent_trials=2, **tune_config),
        run_config=tune.RunConfig(storage_path=str(folder), name="run", verbose=0),
    )
    return tuner.fit()


def test_a_goal_on_a_metric_that_is_not_reported_is_refused_before_any_trial(digits_task):
    with pytest.raises(MissingMetricError, match=r"'f1'.*accuracy"):
        nc.compression_trainable(digits_task, nc.Goal([nc.Objective("f1")]))
    with pytest.raises(ConfigError, match="epochs"):
        nc.compression_trainable(digits_task, GOAL, epochs=-1)
    with pytest.raises(ConfigError, match="task: a ResidualNet was given"):
        nc.compression_trainable(digits_task.model, GOAL)
    with pytest.raises(ConfigError, match="goal: 'accuracy'"):
        nc.compression_trainable(digits_task, "accuracy")


@pytest.mark.slow
def test_our_searcher_and_scheduler_end_with_a_model_on_disk(ray_session, digits_task, tmp_path):
    grid = run(
        nc.compression_trainable(digits_task, GOAL, epochs=4),
        nc.compression_space(digits_task),
        tmp_path,
        trials=10,
        search_alg=EvolutionarySearch(GOAL, nc.CostModel(digits_task), seed=0),
        scheduler=ParetoASHAScheduler(GOAL, max_t=5, grace_period=3),
    )
    results = nc.Results(grid)
    assert not grid.errors
    assert len(results) == 10
    completed = [t for t in results.trials if t.status == "completed"]
    assert completed
    for trial in completed:
        assert [r["training_iteration"] for r in trial.rows] == [1, 2, 3, 4, 5]
        assert {"model.onnx", "model.safetensors", "manifest.json"} == set(os.listdir(trial.checkpoint))
        assert (Path(trial.checkpoint) / "model.onnx").stat().st_size == round(trial.metrics["size_mb"] * 1e6)
    best = results.best("accuracy", [nc.Constraint("size_ratio", ">=", 1.0)])
    measured = best.evaluate()
    assert measured["accuracy"] > 0.5
    assert measured["size_ratio"] == pytest.approx(best.metrics["size_ratio"])
    assert {"speedup_batch_1", "speedup_batch_32"} <= measured.keys()
    refined = best.refine(5, folder=tmp_path / "refined")
    assert results.goal.is_feasible(refined.metrics)
    assert refined.metrics["accuracy"] >= best.metrics["accuracy"]
    # As if it had been stopped after an epoch: its learning rate was that of four all the same.
    poor = replace(best, metrics={**best.metrics, "accuracy": 0.0, "accuracy_drop": 1.0, "epoch": 1})
    longer = poor.refine(8, folder=tmp_path / "longer")
    assert longer.metrics["epoch"] == 8
    assert longer.config["finetune"]["lr"] == pytest.approx(best.config["finetune"]["lr"] * 2**-0.32)
    perfect = replace(best, metrics={**best.metrics, "accuracy": 1.01})
    assert perfect.refine(1, folder=tmp_path / "worse") is perfect
    assert not (tmp_path / "worse").exists()
    assert best.export(tmp_path / "model.onnx").stat().st_size == round(best.metrics["size_mb"] * 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["optuna", "random and asha"])
def test_the_trainable_runs_under_stock_searchers_and_schedulers(ray_session, digits_task, tmp_path, kind):
    options = {"metric": "score", "mode": "max"}
    if kind == "optuna":
        pytest.importorskip("optuna")
        from ray.tune.search.optuna import OptunaSearch

        options["search_alg"] = OptunaSearch()
    else:
        options["scheduler"] = ASHAScheduler(max_t=3, grace_period=1)
    space = nc.compression_space(digits_task)
    grid = run(nc.compression_trainable(digits_task, GOAL, epochs=2), space, tmp_path, trials=3, **options)
    assert not grid.errors
    assert all(result.metrics["score"] > -1e9 for result in grid)
    assert any(result.metrics["final"] for result in grid)


@pytest.mark.slow
def test_infeasible_configs_are_results_and_mistakes_are_failed_trials(ray_session, digits_task, tmp_path):
    space = {"prune": {"sparsity": {"first.0": tune.grid_search([0.5, 0.99])}}, "quantize": {"bits": 8}}
    grid = run(nc.compression_trainable(digits_task, GOAL, epochs=0), space, tmp_path, trials=1)
    results = nc.Results(grid)
    assert sorted(t.status for t in results.trials) == ["completed", "infeasible"]
    wrong = {"prune": {"sparsity": {"nowhere": tune.grid_search([0.5])}}}
    grid = run(nc.compression_trainable(digits_task, GOAL, epochs=0), wrong, tmp_path / "wrong", trials=1)
    assert "'nowhere' is unknown" in str(grid.errors[0])


@pytest.mark.slow
def test_a_users_own_function_trainable_compresses(ray_session, digits_task, tmp_path):
    def mine(config, task):
        torch.set_num_threads(1)
        for step in nc.compress_steps(task, config, epochs=1, goal=GOAL):
            tune.report(step.metrics)

    trainable = tune.with_parameters(mine, task=digits_task)
    grid = run(trainable, nc.compression_space(digits_task), tmp_path, trials=2, search_alg=EvolutionarySearch(GOAL))
    assert not grid.errors
    assert all(result.metrics["stage"] == "exported" for result in grid)


@pytest.mark.slow
def test_a_large_model_travels_once(ray_session, tmp_path):
    wide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4096), torch.nn.ReLU())
    for _ in range(6):
        wide.extend([torch.nn.Linear(4096, 4096), torch.nn.ReLU()])
    wide.append(torch.nn.Linear(4096, 10))
    assert sum(p.numel() for p in wide.parameters()) * 4 > 400e6
    data = (torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
    task = nc.Task(wide, data, data)
    trainable = nc.compression_trainable(task, nc.Goal([nc.Objective("accuracy")]), epochs=0)

    class Watched(trainable):
        def step(self):
            private = _private_bytes()
            return {"private": private, "done": True}

    tuner = tune.Tuner(
        Watched,
        param_space={"prune": {"sparsity": 0.5}},
        tune_config=tune.TuneConfig(
            num_samples=1, search_alg=EvolutionarySearch(nc.Goal([nc.Objective("private")]), nc.CostModel(task))
        ),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path),
            name="large",
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    grid = tuner.fit()
    assert not grid.errors
    assert (tmp_path / "large" / "tuner.pkl").stat().st_size < 5e6
    # A worker without the weights has some 430 MB of its own; a copy of them would make it 830.
    assert grid[0].metrics["private"] < 650e6


def _private_bytes() -> int:
    """Memory of this process that it shares with no other."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Private"))
