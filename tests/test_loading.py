from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from networks import ResidualNet

import ray_nascomp as nc
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.errors import ConfigError

CONFIG = {
    "prune": {"sparsity": 0.5},
    "low_rank": {"rank": {"expand.0": 0.5}},
    "quantize": {"method": "qat", "bits": 8},
    "finetune": {"lr": 2e-2},
}


@pytest.fixture(scope="module")
def saved(digits_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    step = nc.compress(digits_task, CONFIG, epochs=3)
    step.save(folder)
    return folder, step


def test_a_loaded_network_is_the_one_that_was_saved(saved, digits):
    folder, step = saved
    network = nc.load(folder, ResidualNet())
    inputs = digits["val"][0]
    with torch.no_grad():
        assert torch.equal(network(inputs), step.run.candidate.network.eval()(inputs))
        integers = run_session(make_session(step.artifact.content), inputs, ("x",))
        assert (network(inputs).argmax(1).numpy() == integers.argmax(1)).mean() > 0.97
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in ResidualNet().parameters()) / 2


def test_a_network_that_is_another_is_refused(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(ConfigError, match=r"unknown|not the one"):
        nc.load(folder, ResidualNet(width=24))
    with pytest.raises(ConfigError, match="none was given"):
        nc.load(folder)
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        nc.load(tmp_path, ResidualNet())


def test_a_model_of_transformers_is_rebuilt_from_its_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(0, 50, (16, 8)), "attention_mask": torch.ones(16, 8, dtype=torch.long)}
    task = nc.Task(model, (inputs, torch.arange(16) % 3), (inputs, torch.arange(16) % 3))
    heads = {group.name: 0.5 for group in task.spec.prunable_groups if group.is_heads}
    step = nc.compress(task, {"prune": {"sparsity": heads}, "quantize": {"bits": 8}}, epochs=0)
    step.save(tmp_path)
    network = nc.load(tmp_path)
    with torch.no_grad():
        found, expected = network(**inputs).logits, step.run.candidate.network.eval()(**inputs).logits
    assert np.abs(found - expected).max() == 0
    assert network.bert.encoder.layer[0].attention.self.query.out_features == 16
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["transformers"]["class"] = "Trainer"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="'Trainer' is no model"):
        nc.load(tmp_path)
