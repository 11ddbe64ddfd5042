from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from torch import nn
from transformer_families import make, whole

import ray_nascomp as nc
from ray_nascomp.architecture import elastic_transformer
from ray_nascomp.errors import ConfigError

SETTINGS: dict[str, Any] = {"epochs": 4, "lr": 2e-2, "show_progress": False}


class Branches(nn.Module):
    """A stem and optional residual blocks, of any width."""

    def __init__(self, width: int, blocks: list[bool]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleDict(
            {str(i): nn.Conv2d(width, width, 3, padding=1) for i, kept in enumerate(blocks) if kept}
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        for block in self.blocks.values():
            x = torch.relu(x + block(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def build(architecture: dict[str, Any]) -> nn.Module:
    return Branches(architecture["width"], [architecture["first"], architecture["second"]])


ARCHITECTURE = {
    "width": tune.choice([8, 16, 32]),
    "first": tune.choice([True, False]),
    "second": tune.choice([True, False]),
}
SMALLEST = {"width": 8, "first": False, "second": False}
LARGEST = {"width": 32, "first": True, "second": True}


def loss_of(task: nc.Task, architecture: dict[str, Any]) -> float:
    from ray_nascomp.compression.batch_norm import reestimate_batch_norm

    network = task.network(architecture).eval()
    reestimate_batch_norm(network, task.calibration_batches())
    inputs, targets = task.train_data.head(256)
    with torch.no_grad():
        return float(task.loss(network(inputs), targets))


@pytest.fixture
def digits_space(digits: dict[str, Any]) -> nc.Task:
    torch.manual_seed(0)
    train = tuple(tensor[:512] for tensor in digits["train"])
    return nc.Task(build(LARGEST), train, digits["val"], build=build, architecture=ARCHITECTURE, batch_size=64)


def test_training_moves_the_smallest_and_the_largest(digits_space: nc.Task, tmp_path: Path) -> None:
    task = nc.train_supernet(digits_space, **SETTINGS, folder=tmp_path)
    assert loss_of(task, SMALLEST) < 0.95 * loss_of(digits_space, SMALLEST)
    assert loss_of(task, LARGEST) < 0.5 * loss_of(digits_space, LARGEST)
    assert task.fingerprint != digits_space.fingerprint
    assert task.original is digits_space
    torch.testing.assert_close(task.network(LARGEST).state_dict(), task.model.state_dict())

    again = nc.train_supernet(digits_space, **SETTINGS, folder=tmp_path / "other")
    assert again.fingerprint == task.fingerprint  # Deterministic.
    assert nc.train_supernet(digits_space, **{**SETTINGS, "epochs": 1}).fingerprint != task.fingerprint


def test_a_supernet_is_trained_once(digits_space: nc.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS, "epochs": 1, "folder": tmp_path}
    first = nc.train_supernet(digits_space, **settings)
    monkeypatch.setattr("ray_nascomp.architecture.supernet._train", None)
    assert nc.train_supernet(digits_space, **settings).fingerprint == first.fingerprint
    with pytest.raises(ConfigError, match="holds a supernet with another seed"):
        nc.train_supernet(digits_space, **{**settings, "seed": 1})
    (tmp_path / "supernet.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="cannot be read"):
        nc.train_supernet(digits_space, **settings)


def test_a_trial_takes_its_network_from_the_supernet(digits_space: nc.Task) -> None:
    task = nc.train_supernet(digits_space, **SETTINGS)
    metrics = {}
    for name, chosen in (("before", digits_space), ("after", task)):
        metrics[name] = nc.compress(chosen, {"architecture": {"width": 16, "first": True, "second": False}}, 0).metrics
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"] + 0.2
    # Both are relative to the model that was given.
    assert metrics["after"]["params_ratio"] == metrics["before"]["params_ratio"]
    drop = metrics["after"]["accuracy"] + metrics["after"]["accuracy_drop"]
    assert drop == pytest.approx(metrics["before"]["accuracy"] + metrics["before"]["accuracy_drop"])


def test_a_transformers_sub_network_equals_the_supernet_with_the_rest_masked() -> None:
    model, inputs = make("bert", num_labels=2, hidden_dropout_prob=0.0)
    data = ({name: torch.cat([value] * 8) for name, value in inputs.items()}, torch.tensor([0, 1] * 8))
    builder, architecture = elastic_transformer(model)
    task = nc.train_supernet(
        nc.Task(model, data, data, build=builder, architecture=architecture, batch_size=4), **{**SETTINGS, "epochs": 1}
    )
    assert not torch.equal(task.model.classifier.weight, model.classifier.weight)
    chosen = whole(architecture)
    chosen["bert.encoder.layer.0"] |= {"heads": 2, "width": 24}
    chosen["bert.encoder.layer.2"]["keep"] = False
    masked = copy.deepcopy(task.model)
    block = builder.blocks[0]
    removed = task.build.ranking[block.attentions[0].name][2:]
    for name, columns in block.attentions[0].columns(removed).items():
        masked.get_submodule(name).weight.data[:, columns] = 0
    contract = block.feed_forward.contract
    masked.get_submodule(contract).weight.data[:, task.build.ranking[contract][24:]] = 0
    masked.bert.encoder.layer[2].forward = lambda states, *rest, **others: states
    with torch.no_grad():
        taken = task.network(chosen).eval()(**inputs).logits
        torch.testing.assert_close(taken, masked.eval()(**inputs).logits, rtol=0, atol=1e-5)
        kept = task.network(whole(architecture)).eval()(**inputs).logits
        assert torch.equal(kept, task.model.eval()(**inputs).logits)


def test_the_order_of_heads_is_kept_with_the_supernet(tmp_path: Path) -> None:
    model, inputs = make("bert", num_labels=2)
    data = (dict(inputs), torch.tensor([0, 1]))
    builder, architecture = elastic_transformer(model)
    settings: dict[str, Any] = {"epochs": 1, "show_progress": False, "folder": tmp_path}
    task = nc.Task(model, data, data, build=builder, architecture=architecture)
    trained = nc.train_supernet(task, **settings)
    turned = {name: order[::-1] for name, order in builder.ranking.items()}
    loaded = nc.train_supernet(task.with_changes(build=builder.with_model(model, turned)), **settings)
    assert loaded.build.ranking == trained.build.ranking == builder.ranking


def test_what_has_no_supernet_is_refused(digits: dict[str, Any], digits_space: nc.Task) -> None:
    plain = nc.Task(build(LARGEST), digits["train"], digits["val"])
    with pytest.raises(ConfigError, match="no architecture to search"):
        nc.train_supernet(plain, epochs=1)
    for name, value in (("epochs", 0), ("sub_networks", -1), ("lr", 0.0)):
        with pytest.raises(ConfigError, match=f"{name}: {value}"):
            nc.train_supernet(digits_space, **{"epochs": 1, name: value})
    too_small = digits_space.with_changes(model=build(SMALLEST))
    with pytest.raises(ConfigError, match="no part of one of the model's"):
        nc.train_supernet(too_small, **SETTINGS)
