from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import ray_nascomp as nc
from ray_nascomp.compression.distill import distillation_loss
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.errors import ConfigError
from ray_nascomp.pipeline import CompressionRun, measure
from ray_nascomp.pipeline.prepare import prepare

PLAN = {
    "prune": {"method": "l2_norm", "sparsity": 0.5},
    "finetune": {"lr": 3e-3, "distill": {"weight": 0.5}},
    "quantize": {"method": "ptq", "bits": 8},
}


def test_every_step_reports_the_same_finite_keys(digits_task):
    steps = list(nc.compress_steps(digits_task, PLAN, epochs=2))
    infeasible = nc.compress(digits_task, {"prune": {"sparsity": 0.98}}, epochs=2).metrics
    assert [step.metrics["stage"] for step in steps] == ["compressed", "finetuned", "exported"]
    assert [step.metrics["final"] for step in steps] == [False, False, True]
    assert [step.artifact is not None for step in steps] == [True, False, True]
    for metrics in (*(step.metrics for step in steps), infeasible):
        assert metrics.keys() == steps[0].metrics.keys()
        assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))
    assert not infeasible["feasible"]
    assert "would leave none" in infeasible["reason"]


def test_the_last_report_is_measured_on_the_exported_file(digits, digits_task):
    step = nc.compress(digits_task, PLAN, epochs=2)
    inputs, targets = digits["val"]
    outputs = run_session(make_session(step.artifact.content), inputs, digits_task.input_names)
    assert step.metrics["accuracy"] == pytest.approx((outputs.argmax(1) == targets.numpy()).mean())
    assert step.metrics["size_mb"] == len(step.artifact.content) / 1e6
    assert step.metrics["params"] == sum(p.numel() for p in step.run.candidate.network.parameters())


def test_divergence_is_that_of_the_files_outputs_from_the_originals(digits, digits_task):
    step = nc.compress(digits_task, PLAN, epochs=1)
    inputs, _ = digits["val"]
    with torch.no_grad():
        known = digits_task.model.eval()(inputs).double().log_softmax(1)
    outputs = run_session(make_session(step.artifact.content), inputs, digits_task.input_names)
    found = torch.from_numpy(outputs).double().log_softmax(1)
    expected = float((known.exp() * (known - found)).sum(1).mean())
    assert step.metrics["divergence"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.001
    assert nc.compress(digits_task, {}, epochs=0).metrics["divergence"] < 1e-6
    # A plan that cannot be carried out tells nothing of any class.
    infeasible = nc.compress(digits_task, {"prune": {"sparsity": 0.98}}, epochs=1).metrics["divergence"]
    assert infeasible == pytest.approx(float((known.exp() * (known + math.log(10))).sum(1).mean()), rel=1e-3)


def _error(outputs, targets):
    return float(-(outputs - targets).square().mean())


def test_where_targets_are_numbers_divergence_is_the_mean_squared_difference():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    inputs = torch.randn(300, 4)
    task = nc.Task(
        network, (inputs, inputs[:, :2]), (inputs, inputs[:, :2]), metric=_error, loss=nn.functional.mse_loss
    )
    step = nc.compress(task, {"prune": {"sparsity": {"*": 0.5}}}, epochs=0)
    outputs = run_session(make_session(step.artifact.content), inputs, task.input_names)
    with torch.no_grad():
        expected = float((network.eval()(inputs) - torch.from_numpy(outputs)).square().mean())
    assert step.metrics["divergence"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.001


def test_divergence_is_from_the_tasks_own_model_where_the_original_is_worse(digits, digits_task):
    # Its input has another name, too.
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    original = nc.Task(other, digits["train"], digits["val"])
    task = nc.Task(digits_task.model, digits["train"], digits["val"], original=original)
    metrics = nc.compress(task, {}, epochs=0).metrics
    assert metrics["divergence"] < 1e-6
    assert metrics["accuracy_drop"] < 0
    assert metrics["speedup"] < 1


def test_an_original_that_reads_alike_and_is_no_worse_teaches_and_is_what_divergence_is_from(digits, digits_task):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    task = nc.Task(student, digits["train"], digits["val"], original=digits_task)
    alone = nc.Task(student, digits["train"], digits["val"])
    assert task.teacher is digits_task
    assert alone.teacher is alone
    assert task.fingerprint != alone.fingerprint
    known, _ = digits_task.outputs(digits_task.predict(digits_task.model), digits_task.val_data)
    found, targets = task.outputs(task.predict(student), task.val_data)
    metrics = nc.compress(task, {}, epochs=0).metrics
    assert metrics["divergence"] == pytest.approx(distillation_loss(found, known, targets).item(), rel=1e-3)
    # Its own, untrained model could teach it nothing.
    config = {"finetune": {"lr": 1e-2, "distill": {"weight": 1.0}}}
    assert nc.compress(task, config, epochs=4).metrics["accuracy"] > 0.6
    assert nc.compress(alone, config, epochs=4).metrics["accuracy"] < 0.3
    others = digits_task.with_changes(val_data=(digits["val"][0] + 1, digits["val"][1]))
    assert task.with_changes(original=others).teacher is not others


QUANTIZERS = [
    *(("ptq", 8), ("ptq", 4), ("qat", 8), ("qat", 2), ("lsq", 8), ("lsq", 3), ("lsq_plus", 8), ("dorefa", 4)),
    ("bnn", 1),
]


@pytest.mark.parametrize(("method", "bits"), QUANTIZERS)
def test_exported_integers_agree_with_nnis_simulation(digits, digits_task, method, bits):
    config = {**PLAN, "quantize": {"method": method, "bits": bits}}
    run = CompressionRun(digits_task, config, epochs=2)
    while not run.is_done:
        step = run.step()
    prepared = prepare(run.candidate, digits_task)
    simulated = measure.simulate(prepared, digits_task, run.outputs).outputs
    found = run_session(make_session(step.artifact.content), digits["val"][0], digits_task.input_names)
    assert (simulated.argmax(1).numpy() == found.argmax(1)).mean() >= (0.98 if method == "lsq" else 0.99)
    assert step.metrics["export_error"] < 0.03
    graph = onnx.load_from_string(step.artifact.content).graph
    integers = [i for i in graph.initializer if i.name.endswith(".weight_q")]
    assert len(integers) == len(digits_task.spec.compressible_layers)
    if bits == 8:
        assert all(np.abs(onnx.numpy_helper.to_array(i)).max() <= 63 for i in integers)


def test_layers_of_32_bits_stay_in_floating_point(digits_task):
    step = nc.compress(digits_task, {"quantize": {"bits": {"*": 8, "head": 32, "stem.0": 32}}}, epochs=0)
    names = {i.name for i in onnx.load_from_string(step.artifact.content).graph.initializer}
    assert "first.0.weight_q" in names
    assert "head.weight_q" not in names
    assert "stem.0.weight_q" not in names


def test_progress_tells_what_the_teacher_has_read_and_the_epochs_that_are_done(digits, digits_task):
    told = []
    task = digits_task.with_changes(batch_size=100)
    steps = nc.compress_steps(
        task, {"finetune": {"distill": {"weight": 0.5}}}, 2, on_progress=lambda *p: told.append(p)
    )
    assert len(list(steps)) == 3
    taught = [done for doing, done in told if doing == "teacher"]
    trained = [done for doing, done in told if doing == "training"]
    count = len(digits["train"][1])
    # Before the first batch is done with; the second epoch asks the teacher nothing.
    assert [doing for doing, _ in told[:3]] == ["training", "teacher", "teacher"]
    assert taught == pytest.approx([first / count for first in range(0, count, 100)])
    batches = -(-count // 100)
    assert trained == pytest.approx([number / batches for number in range(2 * batches)])


def test_progress_tells_how_far_scheduled_pruning_is(digits, digits_task):
    told = []
    config = {"prune": {"method": "l1_norm", "schedule": "agp", "sparsity": {"*": 0.5}}}
    task = digits_task.with_changes(batch_size=100)
    assert len(list(nc.compress_steps(task, config, 1, on_progress=lambda *p: told.append(p)))) == 2
    batches = -(-len(digits["train"][1]) // 100)
    passed = [number / batches for number in range(batches)]
    assert [doing for doing, _ in told] == ["pruning"] * batches + ["training"] * batches
    assert [done for _, done in told] == pytest.approx([*passed, *passed])


def test_the_identity_plan_gives_the_tasks_own_model(digits, digits_task):
    step = nc.compress(digits_task, {}, epochs=0)
    outputs = run_session(make_session(step.artifact.content), digits["val"][0], digits_task.input_names)
    with torch.no_grad():
        expected = digits_task.model.eval()(digits["val"][0]).numpy()
    assert np.abs(outputs - expected).max() < 1e-4
    assert step.metrics["params_ratio"] == 1
    assert step.metrics["accuracy_drop"] == 0


def test_the_same_plan_gives_the_same_result(digits_task):
    results = [nc.compress(digits_task, PLAN, epochs=2) for _ in range(2)]
    assert results[0].artifact.content == results[1].artifact.content
    assert results[0].metrics["accuracy"] == results[1].metrics["accuracy"]


@pytest.mark.parametrize("method", ["ptq", "qat"])
@pytest.mark.parametrize("interrupted_after", [1, 2, 4])
def test_a_restored_run_equals_the_uninterrupted_one(digits_task, tmp_path, method, interrupted_after):
    config = {**PLAN, "quantize": {"method": method, "bits": 8}}
    whole = [step.metrics["accuracy"] for step in nc.compress_steps(digits_task, config, epochs=4)]
    content = nc.compress(digits_task, config, epochs=4).artifact.content
    first = CompressionRun(digits_task, config, epochs=4)
    for _ in range(interrupted_after):
        first.step()
    first.save(tmp_path)
    second = CompressionRun(digits_task, config, epochs=4)
    second.restore(tmp_path)
    values = []
    while not second.is_done:
        values.append(second.step().metrics["accuracy"])
    assert values == whole[interrupted_after:]
    assert second.artifact.content == content


def test_a_saved_run_is_readable_without_pickle(digits_task, tmp_path):
    step = nc.compress(digits_task, PLAN, epochs=1)
    step.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config"] == PLAN
    assert (tmp_path / "model.onnx").read_bytes() == step.artifact.content
    table = {row["name"]: row for row in manifest["layers"]}
    assert table["first.0"]["sparsity"] == 0.5
    assert table["first.0"]["params_after"] == table["first.0"]["params_before"] / 4
    assert sum(row["params_after"] for row in manifest["layers"]) == step.metrics["params"]


def test_restoring_from_another_task_or_from_rubbish_is_refused(digits, digits_task, tmp_path):
    from networks import PlainNet

    nc.compress(digits_task, PLAN, epochs=0).save(tmp_path)
    other = CompressionRun(nc.Task(PlainNet(), digits["train"], digits["val"]), {}, epochs=0)
    with pytest.raises(ConfigError, match="another task"):
        other.restore(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        other.restore(tmp_path)


def test_nan_weights_are_an_infeasible_result_and_other_errors_surface(digits, monkeypatch):
    from networks import PlainNet

    from ray_nascomp.pipeline import run as run_module

    network = PlainNet()
    task = nc.Task(network, digits["train"], digits["val"])
    exploding = {"finetune": {"lr": 1e30}}
    metrics = nc.compress(task, exploding, epochs=1).metrics
    assert not metrics["feasible"]
    assert "not finite" in metrics["reason"]

    def planted(*_arguments):
        raise RuntimeError("planted")

    monkeypatch.setattr(run_module, "make_candidate", planted)
    with pytest.raises(RuntimeError, match="planted"):
        nc.compress(task, PLAN, epochs=1)


def test_a_run_that_became_infeasible_while_training_is_restored_as_done(digits, tmp_path):
    from networks import PlainNet

    task = nc.Task(PlainNet(), digits["train"], digits["val"])
    exploding = {"finetune": {"lr": 1e30}}
    step = nc.compress(task, exploding, epochs=1)
    step.save(tmp_path)
    again = CompressionRun(task, exploding, epochs=1)
    again.restore(tmp_path)
    assert again.is_done
    assert again.metrics["reason"] == step.metrics["reason"]


def test_negative_epochs_are_refused(digits_task):
    with pytest.raises(ConfigError, match="epochs: -1"):
        nc.compress(digits_task, {}, epochs=-1)
