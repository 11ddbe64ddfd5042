from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import ray_nascomp as nc
from ray_nascomp.compression.batch_norm import reestimate_batch_norm
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.errors import ConfigError
from ray_nascomp.pipeline import CompressionRun
from ray_nascomp.pipeline.prepare import prepare

EPOCHS = 3


def config(sparsity, **more):
    return {"prune": {"sparsity": sparsity}, "quantize": {"bits": 8}, "finetune": {"lr": 3e-3}, **more}


def saved(task, plan, folder, steps=2):
    run = CompressionRun(task, plan, EPOCHS)
    for _ in range(steps):
        run.step()
    run.save(folder)
    return run


def continued(task, plan, folder):
    run = CompressionRun(task, plan, EPOCHS)
    run.continue_from(folder)
    return run


def test_what_stays_is_the_winners_and_the_rest_is_chosen_among_it(digits_task, tmp_path):
    winner = saved(digits_task, config(0.3), tmp_path)
    run = continued(digits_task, config(0.6), tmp_path)
    counts = run.costs.removed(run.plan)
    for group in digits_task.spec.prunable_groups:
        removed = run.candidate.removed[group.name]
        assert set(winner.candidate.removed[group.name]) < set(removed)
        assert len(removed) == counts[group.name] == round(0.6 * group.width)
    # The removed filters are those of the lowest norm among what the winner has left.
    group = digits_task.spec.group_of("first.0")
    left = [unit for unit in range(group.width) if unit not in winner.candidate.removed[group.name]]
    norms = winner.candidate.network.get_submodule("first.0").weight.detach().abs().sum((1, 2, 3))
    more = len(run.candidate.removed[group.name]) - len(winner.candidate.removed[group.name])
    expected = {left[unit] for unit in norms.argsort()[:more].tolist()}
    assert set(run.candidate.removed[group.name]) - set(winner.candidate.removed[group.name]) == expected


def test_the_weights_that_stay_are_the_winners(digits_task, tmp_path):
    winner = saved(digits_task, config(0.3), tmp_path)
    run = continued(digits_task, config(0.6), tmp_path)
    rows = {unit: row for row, unit in enumerate(u for u in range(16) if u not in winner.candidate.removed["first.0"])}
    kept = [rows[u] for u in range(16) if u not in run.candidate.removed["first.0"]]
    ours, theirs = (r.candidate.network.get_submodule("first.1").weight for r in (run, winner))
    assert torch.equal(ours, theirs[kept])


def test_it_goes_on_at_the_winners_step_and_exports_what_it_simulates(digits, digits_task, tmp_path):
    saved(digits_task, config(0.3), tmp_path)
    run = continued(digits_task, config(0.5), tmp_path)
    stages = []
    while not run.is_done:
        step = run.step()
        stages.append((step.metrics["epoch"], step.metrics["stage"]))
    assert stages == [(2, "finetuned"), (3, "exported")]
    assert step.metrics["params"] == sum(p.numel() for p in run.candidate.network.parameters())
    assert step.metrics["accuracy"] > 0.3
    outputs = run_session(make_session(step.artifact.content), digits["val"][0], digits_task.input_names)
    assert step.metrics["accuracy"] == pytest.approx((outputs.argmax(1) == digits["val"][1].numpy()).mean())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (config(0.3, low_rank={"rank": 0.8}), config(0.5, low_rank={"rank": 0.4})),
        (config(0.3), config(0.3, low_rank={"rank": 0.5})),
        (config(0.3, low_rank={"rank": 0.8}), config(0.3, low_rank={"rank": 0.8}, quantize={"bits": 4})),
        (
            {**config(0.0), "prune": {"method": "level", "sparsity": 0.3}},
            {**config(0), "prune": {"method": "level", "sparsity": 0.6}},
        ),
        (
            config(0.3, quantize={"method": "qat", "bits": 8, "start": 0}),
            config(0.6, quantize={"method": "qat", "bits": 8}),
        ),
    ],
    ids=["ranks", "new ranks", "equal ranks", "weights", "trained with integers"],
)
def test_ranks_weights_and_integers_go_on_too(digits_task, tmp_path, before, after):
    saved(digits_task, before, tmp_path / "winner")
    run = continued(digits_task, after, tmp_path / "winner")
    run.step()
    run.save(tmp_path / "own")
    restored = CompressionRun(digits_task, after, EPOCHS)
    restored.restore(tmp_path / "own")
    one, other = run.step(), restored.step()
    assert one.metrics["accuracy"] == other.metrics["accuracy"]
    assert one.artifact.content == other.artifact.content
    zeros = sum(int((mask == 0).sum()) for mask in run.candidate.masks.values())
    counted = sum(p.numel() for p in run.candidate.network.parameters())
    assert (zeros > 0) == ("level" in str(after))
    if not run.candidate.is_prepared:  # Else normalisations are folded, which the report counts.
        assert one.metrics["params"] == counted


def test_a_network_that_has_not_been_trained_since_computes_what_the_winner_did(digits, digits_task, tmp_path):
    plan = config(0.3, low_rank={"rank": 0.6})
    winner = saved(digits_task, plan, tmp_path)
    run = continued(digits_task, {**plan, "finetune": {"lr": 1e-3}}, tmp_path)
    outputs = []
    reestimate_batch_norm(winner.candidate.network, digits_task.calibration_batches())  # As the other's are.
    for each in (winner, run):
        network = prepare(each.candidate, digits_task).network
        with torch.no_grad():
            outputs.append(network(digits["val"][0]).numpy())
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-3


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (config(0.2), "are to go"),
        (config(0.4, low_rank={"rank": 0.9}), "rank"),
        (config(0.4, order=["low_rank", "prune"]), "order"),
    ],
)
def test_structures_that_do_not_contain_the_plans_are_refused(digits_task, tmp_path, after, reason):
    saved(digits_task, config(0.3, low_rank={"rank": 0.5}), tmp_path)
    with pytest.raises(ConfigError, match=reason):
        continued(digits_task, after, tmp_path)


def test_a_plan_that_cannot_be_carried_out_is_an_infeasible_result(digits_task, tmp_path):
    saved(digits_task, config(0.3), tmp_path)
    run = continued(digits_task, config(0.98), tmp_path)
    assert "would leave none" in run.step().metrics["reason"]


def test_the_stage_cache_is_left_alone(digits_task, tmp_path):
    from ray_nascomp.pipeline.reuse import Reuse
    from ray_nascomp.pipeline.stage_cache import StageCache

    saved(digits_task, config(0.3), tmp_path / "winner")
    cache = StageCache(tmp_path / "cache")
    run = CompressionRun(digits_task, config(0.5), EPOCHS, reuse=Reuse(cache, "origin"))
    run.continue_from(tmp_path / "winner")
    run.step()
    run.save(tmp_path / "own")
    restored = CompressionRun(digits_task, config(0.5), EPOCHS, reuse=Reuse(cache, "origin"))
    restored.restore(tmp_path / "own")
    restored.step()
    assert cache.size == 0
    assert json.loads((tmp_path / "own" / "manifest.json").read_text())["continued"]


def test_heads_of_attention_are_removed_further(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50, num_labels=3
    )
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(0, 50, (16, 8)), "attention_mask": torch.ones(16, 8, dtype=torch.long)}
    data = inputs, torch.arange(16) % 3
    task = nc.Task(transformers.BertForSequenceClassification(config).eval(), data, data)
    name = next(group.name for group in task.spec.prunable_groups if group.is_heads)
    # Trained with integers, the winner is smoothed; the other takes that back.
    integers = {"method": "qat", "bits": 8, "start": 0}
    winner = saved(task, {"prune": {"sparsity": {name: 0.25}}, "quantize": integers}, tmp_path)
    run = continued(task, {"prune": {"sparsity": 0.5}, "quantize": integers}, tmp_path)
    assert winner.candidate.smoothed
    assert set(winner.candidate.removed[name]) < set(run.candidate.removed[name])
    assert len(run.candidate.removed[name]) == 2
    assert run.step().metrics["feasible"]


def test_only_a_fresh_run_continues(digits_task, tmp_path):
    run = saved(digits_task, config(0.3), tmp_path)
    with pytest.raises(RuntimeError, match="has begun"):
        run.continue_from(tmp_path)
    nc.compress(digits_task, {"prune": {"sparsity": 0.98}}, 0).save(tmp_path / "infeasible")
    with pytest.raises(ConfigError, match="infeasible"):
        continued(digits_task, config(0.99), tmp_path / "infeasible")
