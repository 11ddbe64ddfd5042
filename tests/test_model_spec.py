from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import NETWORKS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ray_nascomp import ModelSpec
from ray_nascomp.costs.cost_table import CostTable
from ray_nascomp.errors import UntraceableModelError

INPUTS = torch.randn(2, 1, 8, 8)


def spec_of(kind: str) -> ModelSpec:
    return ModelSpec.from_model(NETWORKS[kind](), INPUTS)


def dense_costs(spec: ModelSpec) -> dict[str, float]:
    table = CostTable(spec)
    removed, ranks = np.zeros((1, len(spec.groups))), np.zeros((1, len(spec.layers)))
    bits = np.full((1, len(spec.layers)), 32.0)
    layers = table.layers(removed, ranks, table.sides(removed), bits)
    return {metric: float(values[0]) for metric, values in table.totals(layers, removed).items()}


@pytest.mark.parametrize("kind", NETWORKS)
def test_dense_costs_are_those_of_the_network(kind):
    network = NETWORKS[kind]().eval()
    spec = ModelSpec.from_model(network, INPUTS)
    costs = dense_costs(spec)
    assert costs["params"] == sum(p.numel() for p in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        network(INPUTS)
    assert costs["macs"] == counter.get_total_flops() // 2 // len(INPUTS)


def test_residual_channels_are_one_group_and_the_depthwise_convolution_belongs_to_it():
    groups = {g.name: g for g in spec_of("residual").groups}
    assert set(groups["stem.0"].layers) == {"stem.0", "second.0", "depthwise.0"}
    assert groups["stem.0"].prunable
    assert groups["first.0"].layers == ("first.0",)
    assert not groups["head"].prunable


def test_a_concatenation_has_two_input_groups():
    layers = {layer.name: layer for layer in spec_of("concat").layers}
    assert dict(layers["merge.0"].in_groups) == {"left.0": 1, "right.0": 1}


def test_a_flatten_gives_several_inputs_a_channel():
    layers = {layer.name: layer for layer in spec_of("plain").layers}
    assert layers["hidden"].in_groups == (("blocks.1.0", 16),)


def test_batch_normalisations_know_their_convolution():
    layers = {layer.name: layer for layer in spec_of("residual").layers}
    assert layers["second.1"].folds_into == "second.0"
    assert layers["head"].folds_into is None


def test_spec_survives_json_and_is_small():
    spec = spec_of("residual")
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert len(spec.to_json()) < 5000


def test_tracing_leaves_the_model_as_it_was():
    network = NETWORKS["residual"]().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ModelSpec.from_model(network, INPUTS)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_view_into_heads_makes_a_group_unprunable():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(64, 32)
            self.out = nn.Linear(32, 10)

        def forward(self, x):
            heads = self.project(x.flatten(1)).view(-1, 4, 8).softmax(-1)
            return self.out(heads.reshape(-1, 32))

    assert ModelSpec.from_model(Heads(), INPUTS).prunable_groups == ()


def test_a_model_that_does_not_run_is_refused_with_the_reason():
    with pytest.raises(UntraceableModelError, match="example inputs"):
        ModelSpec.from_model(nn.Linear(5, 2), INPUTS)


def test_attentions_whose_heads_stay_whole_are_told() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
    config = transformers.BeitConfig(**sizes, image_size=16, patch_size=8, use_relative_position_bias=True)
    with pytest.warns(UserWarning, match="heads of BeitAttention in BeitModel stay whole"):
        spec = ModelSpec.from_model(transformers.BeitModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)})
    assert "layers.0.mlp.fc1" in spec.prunable_names
    assert not any(group.is_heads for group in spec.groups)


def test_operations_are_counted_where_views_of_weights_pass_through_modules() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    model = transformers.DebertaModel(transformers.DebertaConfig(vocab_size=40, **sizes, **relative))
    tokens = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
    with pytest.warns(UserWarning, match="heads of DisentangledSelfAttention in DebertaModel stay whole"):
        spec = ModelSpec.from_model(model, tokens)
    in_layers = sum(np.prod(layer.weight_shape) * layer.positions for layer in spec.compressible_layers)
    assert in_layers > 6 * 2 * 24 * 32
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_stands_around_unknown_rotated_attention_is_followed() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    model = transformers.Olmo2Model(transformers.Olmo2Config(vocab_size=40, **sizes))
    with pytest.warns(UserWarning, match="heads of Olmo2Attention in Olmo2Model stay whole") as told:
        spec = ModelSpec.from_model(model, {"input_ids": torch.arange(3, 15).reshape(2, 6)})
    assert list(spec.prunable_names) == ["layers.0.mlp.gate_proj", "layers.1.mlp.gate_proj"]
    assert len(told) == 1
