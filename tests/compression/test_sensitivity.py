from __future__ import annotations

import copy
import json

import pytest
import torch
from networks import PlainNet

import ray_nascomp as nc
from ray_nascomp.compression import sensitivity
from ray_nascomp.compression.batch_norm import reestimate_batch_norm
from ray_nascomp.compression.bit_allocation import allocate_bits
from ray_nascomp.compression.probes import Effect, Probe
from ray_nascomp.compression.sensitivity import HOPELESS, Sensitivity, measure_sensitivity
from ray_nascomp.errors import ConfigError

SETTINGS = {"sparsities": (0.25, 0.75), "bits": (3, 8), "ranks": (0.2, 0.6)}


@pytest.fixture(scope="module")
def task() -> nc.Task:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    network = PlainNet().eval()
    inputs = torch.randn(160, 1, 8, 8, generator=generator)
    reestimate_batch_norm(network, [(inputs[:128], inputs[:128])])
    with torch.no_grad():
        network.head.weight.mul_(50)
        targets = network(inputs).argmax(1)
    task = nc.Task(network, (inputs[:128], targets[:128]), (inputs[128:], targets[128:]), batch_size=32)

    def refuse(*_arguments: object) -> None:
        raise AssertionError("validation data were looked at")

    task.val_data.take = refuse
    return task


@pytest.fixture(scope="module")
def table(task) -> Sensitivity:
    return measure_sensitivity(task, **SETTINGS)


class Holder:
    def ready(self) -> None: ...


def loss(task, network) -> float:
    inputs, targets = task.train_data.head(128)
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(network.eval()(inputs), targets))


def test_every_group_and_layer_is_measured_at_every_setting(task, table):
    assert table.loss == pytest.approx(loss(task, task.model), rel=1e-5)
    assert list(table.table("sparsity")) == ["blocks.0.0", "blocks.1.0", "hidden"]
    assert set(table.table("bits")) == {"blocks.0.0", "blocks.1.0", "hidden", "head"}
    assert set(table.table("rank")) == {"blocks.0.0", "blocks.1.0", "hidden", "head"}
    assert all(set(points) == {3, 8} for points in table.table("bits").values())
    for kind, mild, harsh in (("sparsity", 0.25, 0.75), ("bits", 8, 3), ("rank", 0.6, 0.2)):
        totals = [sum(points[setting] for points in table.table(kind).values()) for setting in (mild, harsh)]
        assert totals[0] < totals[1]


def test_sparsity_costs_what_the_loss_without_the_smallest_channels_says(task, table):
    network = copy.deepcopy(task.model)
    gone = network.hidden.weight.abs().sum(1).argsort()[:5]
    with torch.no_grad():
        network.hidden.weight[gone] = 0
        network.hidden.bias[gone] = 0
    reestimate_batch_norm(network, task.calibration_batches())
    assert table.of("sparsity", "hidden", 0.25) == pytest.approx(loss(task, network) - table.loss, rel=1e-4)


def test_few_bits_cost_what_a_rounded_weight_says(task, table):
    network = copy.deepcopy(task.model)
    with torch.no_grad():
        weight = network.head.weight
        scale = weight.abs().amax(1, keepdim=True) / 3
        weight.copy_((weight / scale).round() * scale)
    assert table.of("bits", "head", 3) == pytest.approx(loss(task, network) - table.loss, rel=1e-3)
    inputs = task.train_data.head(128)[0]
    with torch.no_grad():
        original, ours = task.model(inputs), network(inputs)
    distortion = float((ours - original).square().sum() / original.square().sum())
    assert table.distortions("bits")["head"][3] == pytest.approx(distortion, rel=1e-3)


def test_a_low_rank_costs_less_than_that_of_a_plain_svd(task, table):
    network = copy.deepcopy(task.model)
    with torch.no_grad():
        left, values, right = torch.linalg.svd(network.hidden.weight, full_matrices=False)
        rank = round(0.2 * 18)
        network.hidden.weight.copy_(left[:, :rank] * values[:rank] @ right[:rank])
    reestimate_batch_norm(network, task.calibration_batches())
    assert 0 < table.of("rank", "hidden", 0.2) < loss(task, network) - table.loss


def test_settings_between_the_measured_ones_lie_on_a_line():
    table = Sensitivity(
        1.0, {Probe("sparsity", "a", 0.25): Effect(0.1, 0.2), Probe("sparsity", "a", 0.75): Effect(0.5, 0.6)}
    )
    assert table.of("sparsity", "a", 0.5) == pytest.approx(0.3)
    assert table.of("sparsity", "a", 0.125) == pytest.approx(0.05)
    assert table.of("sparsity", "a", 0.0) == 0
    assert table.of("sparsity", "a", 0.9) == 0.5
    with pytest.raises(ConfigError, match=r"'b' is unknown; allowed: 'a'"):
        table.of("sparsity", "b", 0.5)


def test_the_table_is_plain_json(table):
    assert Sensitivity.from_json(table.to_json()) == table
    assert json.loads(table.to_json())["rows"][0][:3] == ["sparsity", "blocks.0.0", 0.25]


def test_bits_can_be_allocated_from_it(task, table):
    weights = {layer.name: torch.Size(layer.weight_shape).numel() for layer in task.spec.quantizable_layers}
    cost = {name: {bits: weights[name] * bits / 8 for bits in (3, 8)} for name in weights}
    found = allocate_bits(table.distortions("bits"), cost, 0.7 * sum(weights.values()))
    assert set(found.values()) == {3, 8}


def test_a_kept_table_is_used_again_until_the_loss_is_another(task, table, tmp_path):
    only_bits = {"sparsities": (), "bits": (8,), "ranks": ()}
    first = measure_sensitivity(task, **only_bits, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    data = json.loads(file.read_text())
    data["rows"][0][3] = 123.0
    file.write_text(json.dumps(data))
    assert measure_sensitivity(task, **only_bits, folder=tmp_path).of("bits", "blocks.0.0", 8) == 123.0
    other = copy.copy(task)
    other._loss = lambda outputs, targets: 2 * torch.nn.functional.cross_entropy(outputs, targets)
    again = measure_sensitivity(other, **only_bits, folder=tmp_path)
    assert again.of("bits", "head", 8) == pytest.approx(2 * first.of("bits", "head", 8), rel=1e-4)


def test_a_loss_that_is_not_finite_is_hopeless(task):
    other = copy.copy(task)
    calls = iter(range(1000))
    other._loss = lambda outputs, targets: torch.tensor(1.0 if next(calls) < 8 else float("nan"))
    table = measure_sensitivity(other, sparsities=(), bits=(8,), ranks=())
    assert {effect.loss for effect in table.measured.values()} == {HOPELESS}


@pytest.mark.parametrize(("key", "value"), [("sparsities", 1.0), ("bits", 0), ("bits", 9), ("bits", 4.5), ("ranks", 0)])
def test_settings_out_of_range_are_refused(task, key, value):
    with pytest.raises(ConfigError, match=key):
        measure_sensitivity(task, **{key: (value,)})


def test_a_transformers_heads_and_smoothed_layers_are_measured():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    inputs = {"input_ids": torch.randint(1, 50, (32, 8)), "attention_mask": torch.ones(32, 8, dtype=torch.long)}
    data = (inputs, torch.arange(32) % 3)
    table = measure_sensitivity(nc.Task(model, data, data), sparsities=(0.5,), bits=(4, 8), ranks=(0.3,))
    heads = [name for name in table.table("sparsity") if name.endswith("attention.self")]
    assert len(heads) == 1
    bits = table.table("bits")
    assert "bert.embeddings.word_embeddings" in bits
    assert sum(abs(points[8]) for points in bits.values()) < 0.3 * sum(abs(points[4]) for points in bits.values())
    assert "bert.encoder.layer.0.intermediate.dense" in table.table("rank")


def test_ray_tasks_measure_the_same(ray_session, task, table):
    found = measure_sensitivity(task, **SETTINGS)
    assert found.measured.keys() == table.measured.keys()
    for probe, effect in table.measured.items():
        assert found.measured[probe].loss == pytest.approx(effect.loss, abs=1e-5)
        assert found.measured[probe].distortion == pytest.approx(effect.distortion, abs=1e-5)


def test_busy_cpus_do_not_stop_it(ray_session, task, table, monkeypatch):
    import ray

    monkeypatch.setattr(sensitivity, "_PATIENCE", 0.5)
    holder = ray.remote(num_cpus=2)(Holder).remote()
    ray.get(holder.ready.remote())
    found = measure_sensitivity(task, sparsities=(), bits=SETTINGS["bits"], ranks=())
    ray.kill(holder)
    assert found.table("bits")["head"] == pytest.approx(table.table("bits")["head"], abs=1e-5)
