from __future__ import annotations

import pytest
import torch
from networks import PlainNet
from torch import nn

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.plan import CompressionPlan


@pytest.fixture(scope="module")
def spec():
    import torch

    return nc.ModelSpec.from_model(PlainNet(), torch.randn(2, 1, 8, 8))


def test_missing_keys_mean_the_identity(spec):
    plan = CompressionPlan.from_config({}, spec)
    assert plan.prune.is_identity
    assert plan.quantize.is_identity
    assert plan.architecture == {}


def test_keys_outside_the_stages_pass_through(spec):
    assert CompressionPlan.from_config({"batch": 8}, spec).extra == {"batch": 8}


def test_one_value_is_for_all_and_names_override(spec):
    plan = CompressionPlan.from_config({"prune": {"sparsity": 0.5}, "quantize": {"bits": {"*": 8, "head": 32}}}, spec)
    assert plan.prune.of("blocks.0.0") == 0.5
    assert plan.quantize.of("blocks.0.0") == 8
    assert plan.quantize.of("head") == 32


def test_what_does_not_matter_is_left_out_of_the_canonical_form(spec):
    one = {"prune": {"method": "fpgm", "sparsity": {"blocks.0.0": 0.0}}, "quantize": {"method": "qat", "bits": 32}}
    other = {"finetune": {"distill": {"weight": 0.0, "temperature": 4.0}}}
    plans = [CompressionPlan.from_config(config, spec) for config in (one, other, {})]
    assert plans[0].canonical() == plans[1].canonical() == plans[2].canonical()
    assert len({plan.seed for plan in plans}) == 1
    assert CompressionPlan.from_config({"prune": {"sparsity": 0.1}}, spec).seed != plans[0].seed


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"prune": {"sparsity": {"nowhere": 0.5}}}, r"prune.sparsity: group: 'nowhere'.*'blocks.0.0'"),
        ({"prune": {"sparsity": 1.0}}, r"prune.sparsity.\*: 1.0 was given, a number in \[0, 1\)"),
        ({"prune": {"sparsity": -0.1}}, r"-0.1 was given"),
        ({"prune": {"sparsity": float("nan")}}, "nan was given"),
        ({"prune": {"sparsity": "half"}}, "'half' was given"),
        ({"prune": {"method": "magnitude"}}, r"prune.method: 'magnitude'.*'l1_norm'"),
        (
            {"prune": {"ratio": 0.5}},
            r"prune: 'ratio' is unknown; allowed: 'method', 'sparsity', 'scope', 'schedule', 'round_to'",
        ),
        ({"prune": 0.5}, "prune: 0.5 was given, a dict"),
        ({"quantize": {"bits": 5}}, r"quantize.bits.\*.*'ptq': 5 is unknown; allowed: 3, 4, 8, 32"),
        ({"quantize": {"bits": 2}}, r"'ptq' \(2 bits without training.*: 2 is unknown"),
        ({"quantize": {"bits": {"conv": 8}}}, r"layer: 'conv' is unknown"),
        ({"quantize": {"method": "gptq"}}, "'gptq'"),
        ({"finetune": {"lr": 0}}, r"finetune.lr: 0 was given, a number in \(0, inf\)"),
        ({"finetune": {"distill": {"weight": 1.5}}}, "finetune.distill.weight"),
        ({"finetune": {"distill": {"alpha": 0.5}}}, "'alpha'"),
        ({"prune": {"method": "level", "sparsity": 0.5}, "quantize": {"method": "bnn", "bits": 1}}, "have no zero"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(spec, config, says):
    with pytest.raises(ConfigError, match=says):
        CompressionPlan.from_config(config, spec)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"prune": {"method": "level", "sparsity": 0.5}}, "the model has no group whose weights can go"),
        ({"low_rank": {"rank": 0.5}}, "low_rank: the model has no layer that can be factorised"),
        ({"quantize": {"bits": 8}}, "quantize.bits: the model has no layer that can have fewer bits"),
    ],
)
def test_what_would_change_nothing_is_refused(config, says):
    spec = nc.ModelSpec.from_model(nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), torch.zeros(2, 1, 8, 8))
    with pytest.raises(ConfigError, match=says):
        CompressionPlan.from_config(config, spec)
    CompressionPlan.from_config({"prune": {"sparsity": 0.0}, "quantize": {"bits": 32}}, spec)


def test_two_of_four_is_refused_where_no_linear_layer_is_pruned():
    config = {"prune": {"method": "2:4", "sparsity": 0.5}}
    head = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    example = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"takes linear layers .* and the model has none"):
        CompressionPlan.from_config(config, nc.ModelSpec.from_model(nn.Sequential(nn.Conv2d(1, 4, 3), head), example))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    CompressionPlan.from_config(config, nc.ModelSpec.from_model(network, example))


def test_slim_is_refused_where_its_factors_mean_nothing():
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
            self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3)))

    spec = nc.ModelSpec.from_model(Concat(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(ConfigError, match="'norm' spans the channels of several groups"):
        CompressionPlan.from_config({"prune": {"method": "slim", "sparsity": {"left": 0.5}}}, spec)
    CompressionPlan.from_config({"prune": {"method": "slim", "sparsity": {"left": 0.0}}}, spec)
