from __future__ import annotations

import pytest
import torch

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.pipeline import CompressionRun

PRUNED = {"prune": {"sparsity": 0.5}}
CHAINS = {
    "factorised first": {**PRUNED, "low_rank": {"rank": {"expand.0": 0.5}}, "order": ["low_rank", "prune"]},
    "pruned first": {**PRUNED, "low_rank": {"rank": {"expand.0": 0.5}}, "quantize": {"method": "lsq", "bits": 4}},
    "gradual": {"prune": {"method": "taylor", "schedule": "agp", "sparsity": 0.5}, "quantize": {"bits": 8}},
    "fused": {
        "prune": {"schedule": "fused", "sparsity": 0.5},
        "finetune": {"distill": {"weight": 0.5}},
        "quantize": {"method": "qat", "bits": 8, "start": 0.0},
    },
    "gradual weights": {"prune": {"method": "movement_level", "schedule": "agp", "sparsity": 0.5}},
    "denoising": {**PRUNED, "finetune": {"distill": {"weight": 0.8, "noise": 0.2, "layers": "adaptive1d"}}},
    "layer by layer": {
        "prune": {"sparsity": {"first.0": 0.5}},
        "finetune": {"distill": {"weight": 0.8, "layers": "dynamic"}},
    },
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_ends_with_a_file_that_does_what_the_network_does(digits_task, chain):
    step = nc.compress(digits_task, CHAINS[chain], epochs=2)
    assert step.metrics["feasible"], step.metrics["reason"]
    assert step.metrics["export_error"] < 0.03
    assert step.metrics["accuracy"] > 0.3
    assert nc.CostModel(digits_task)(CHAINS[chain])["params"] == step.metrics["params"]


@pytest.mark.parametrize("chain", ["pruned first", "fused", "denoising"])
def test_a_chain_that_is_interrupted_ends_where_it_would_have(digits_task, chain, tmp_path):
    whole = nc.compress(digits_task, CHAINS[chain], epochs=2)
    run = CompressionRun(digits_task, CHAINS[chain], epochs=2)
    run.step()
    run.step().save(tmp_path)
    again = CompressionRun(digits_task, CHAINS[chain], epochs=2)
    again.restore(tmp_path)
    while not again.is_done:
        step = again.step()
    assert step.metrics["accuracy"] == whole.metrics["accuracy"]
    assert step.artifact.content == whole.artifact.content


def test_a_schedule_trains_before_the_first_report(digits_task):
    schedules = ("one_shot", "linear")
    first = [
        next(nc.compress_steps(digits_task, {"prune": {"schedule": schedule, "sparsity": 0.7}}, epochs=1))
        for schedule in schedules
    ]
    assert first[1].metrics["accuracy"] > first[0].metrics["accuracy"]


def test_noise_changes_what_the_student_sees_and_nothing_else():
    from ray_nascomp.compression.denoise import noised

    tokens = torch.arange(1, 101).reshape(4, 25)
    mask = torch.ones_like(tokens)
    mask[:, 20:] = 0
    torch.manual_seed(0)
    batch = noised({"input_ids": tokens, "attention_mask": mask}, 0.5)
    changed = batch["input_ids"] != tokens
    assert not changed[:, 20:].any()
    assert 0.3 < changed[:, :20].float().mean() < 0.7
    assert set(batch["input_ids"][:, :20].flatten().tolist()) <= set(tokens[:, :20].flatten().tolist())
    assert torch.equal(batch["attention_mask"], mask)
    values = torch.randn(1000) * 5
    assert (noised(values, 0.1) - values).std().item() == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"prune": {"schedule": "fused", "sparsity": 0.5}}, "needs a quantizer that trains"),
        (
            {
                "prune": {"schedule": "fused", "method": "level", "sparsity": 0.5},
                "quantize": {"method": "qat", "bits": 8},
            },
            "removes channels, and 'level' single weights",
        ),
        ({"prune": {"schedule": "linear", "method": "movement", "sparsity": 0.5}}, "schedule of its own"),
        ({"order": ["prune"]}, "an order of 'prune', 'low_rank'"),
        ({"low_rank": {"rank": 0.5, "energy": 0.9}}, "one of them"),
        ({"quantize": {"bits": "adaptive"}}, "budget: none was given"),
    ],
)
def test_chains_that_make_no_sense_are_refused(digits_task, config, says):
    with pytest.raises(ConfigError, match=says):
        nc.compress(digits_task, config, epochs=0)
