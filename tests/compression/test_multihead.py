from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from candidates import candidate_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ray_nascomp as nc
from ray_nascomp.compression.attention import find_attentions, remove_heads
from ray_nascomp.compression.multihead import SplitAttention, split_attentions

GENERATOR = torch.Generator().manual_seed(0)


class Translator(nn.Module):
    """Torch's own transformer layers: self-attention with and without a bias, cross-attention, padding."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": batch_first}
        self.table = nn.Embedding(30, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, **options), 2)
        self.decoder = nn.TransformerDecoderLayer(32, 2, 40, norm_first=True, **options)
        self.own = nn.MultiheadAttention(32, 4, bias=False, kdim=24, vdim=24, batch_first=batch_first)
        self.narrow = nn.Linear(32, 24)
        self.head = nn.Linear(32, 5)
        self.batch_first = batch_first

    def forward(self, ids):
        features = self.table(ids)
        length = ids.shape[1]
        if not self.batch_first:
            features = features.transpose(0, 1)
        memory = self.encoder(features, src_key_padding_mask=ids == 0)
        later = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        found = self.decoder(features, memory, tgt_mask=later, memory_key_padding_mask=ids == 0)
        narrow = self.narrow(found)
        mixed, shares = self.own(found, narrow, narrow)
        return self.head(mixed.mean(1 if self.batch_first else 0)) + shares.mean((1, 2))[:, None]


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (16, 9), generator=GENERATOR)
    ids[::2, 7:] = 0
    network = Translator().eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=GENERATOR)
    return nc.Task(network, (ids, torch.arange(16) % 5), (ids, torch.arange(16) % 5))


@pytest.mark.parametrize("batch_first", [True, False])
def test_split_attention_computes_the_same(batch_first):
    network = Translator(batch_first).eval()
    split = copy.deepcopy(network)
    split_attentions(split)
    assert sum(isinstance(module, SplitAttention) for module in split.modules()) == 5
    assert not any(type(module) is nn.MultiheadAttention for module in split.modules())
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in network.parameters())
    ids = torch.randint(1, 30, (3, 9), generator=GENERATOR)
    ids[0, 6:] = 0
    torch.testing.assert_close(split(ids), network(ids), rtol=0, atol=1e-5)


def test_masks_of_each_head_and_inputs_without_a_batch_are_taken():
    original = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    split = SplitAttention(original)
    x = torch.randn(2, 5, 12, generator=GENERATOR)
    mask = torch.randn(6, 5, 5, generator=GENERATOR)
    for given, options in (
        (x, {"attn_mask": mask}),
        (x, {"attn_mask": mask, "need_weights": False}),
        (x, {"average_attn_weights": False}),
        (x[0], {}),
        (x[0], {"key_padding_mask": torch.tensor([False, False, True, False, True])}),
    ):
        expected, found = original(given, given, given, **options), split(given, given, given, **options)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3 heads, of which 3 are left"):
        split(x, x, x, attn_mask=mask[:4])


class MaskedNet(nn.Module):
    """Four heads, each of which looks at another distance."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        slopes = torch.tensor([0.0, 0.3, 1.0, 3.0])[:, None, None]
        mask = (-slopes * (places[:, None] - places).abs()).repeat(x.shape[0], 1, 1)
        return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


def test_heads_that_are_left_keep_their_own_masks():
    torch.manual_seed(0)
    data = torch.randn(8, 6, 16, generator=GENERATOR), torch.arange(8) % 3
    task = nc.Task(MaskedNet().eval(), data, data)
    (group,) = [group for group in task.spec.prunable_groups if group.is_heads]
    masked = task.network({}).eval()
    masked.attention.out_proj.weight.data[:, [*range(4), *range(8, 12)]] = 0
    network = task.network({}).eval()
    for unit in (2, 0):
        remove_heads(network, find_attentions(network)[0], [unit])
    assert network.attention.kept_heads == (1, 3)
    torch.testing.assert_close(network(data[0]), masked(data[0]), rtol=0, atol=1e-6)
    step = nc.compress(task, {"prune": {"sparsity": {group.name: 0.5}}}, epochs=0)
    assert step.metrics["export_error"] < 1e-5


def test_attention_with_further_rows_is_left_as_it_is():
    network = nn.ModuleList(
        [nn.MultiheadAttention(8, 2, add_zero_attn=True), nn.MultiheadAttention(8, 2, add_bias_kv=True)]
    )
    split_attentions(network)
    assert all(type(module) is nn.MultiheadAttention for module in network)


def macs_of(network, inputs):
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        network.eval()(inputs)
    return counter.get_total_flops() // 2 // len(inputs)


def test_heads_are_groups_whose_removal_equals_masking_at_exact_costs(task):
    heads = {group.name: group.width for group in task.spec.prunable_groups if group.is_heads}
    assert heads == {
        "encoder.layers.0.self_attn": 4,
        "encoder.layers.1.self_attn": 4,
        "decoder.self_attn": 2,
        "decoder.multihead_attn": 2,
        "own": 4,
    }
    costs = nc.CostModel(task)
    rng = np.random.default_rng(0)
    for _ in range(3):
        shares = {name: float(rng.choice([0.0, 0.5])) for name in heads}
        shares["own"] = 0.75
        candidate = candidate_of(task, {"prune": {"sparsity": shares}})
        masked = task.network({}).eval()
        attentions = {attention.name: attention for attention in find_attentions(masked)}
        for name, units in candidate.removed.items():
            for layer, columns in attentions[name].columns(units).items():
                masked.get_submodule(layer).weight.data[:, columns] = 0
        inputs = task.example_inputs
        shares_of = {}
        # What is averaged over heads is not the output of their layer: here it is left out.
        for label, network in (("found", candidate.network.eval()), ("expected", masked)):
            handle = network.own.register_forward_hook(lambda _m, _i, output: (output[0], torch.zeros_like(output[1])))
            with torch.no_grad():
                shares_of[label] = network(inputs)
            handle.remove()
        torch.testing.assert_close(shares_of["found"], shares_of["expected"], rtol=0, atol=1e-5)
        assert (shares_of["found"] - task.model(inputs)).abs().max() > 1e-2
        told = costs({"prune": {"sparsity": shares}})
        assert told["params"] == sum(parameter.numel() for parameter in candidate.network.parameters())
        assert told["macs"] == macs_of(candidate.network, inputs)


def test_projections_have_ranks_and_bits_and_the_file_is_as_large_as_told(task):
    projections = {"decoder.self_attn.q_proj", "decoder.self_attn.out_proj", "own.k_proj"}
    assert projections <= set(task.spec.factorisable_names)
    config = {
        "prune": {"sparsity": {"encoder.layers.0.self_attn": 0.5}},
        "low_rank": {"rank": {"own.q_proj": 0.5}},
        "quantize": {"bits": 8},
    }
    step = nc.compress(task, config, epochs=0)
    assert step.metrics["feasible"]
    assert step.metrics["export_error"] < 0.05
    assert nc.CostModel(task)(config)["size_mb"] == pytest.approx(step.metrics["size_mb"], rel=0.02)
