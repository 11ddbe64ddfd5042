from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformer_families import FAMILIES, logits, make

from ray_nascomp.compression.attention import attentions_left_whole, find_attentions, remove_heads, replace_conv1d
from ray_nascomp.errors import ConfigError

ATTENTIONS = {
    "bert": (3, "bert.encoder.layer.0.attention.self"),
    "roberta": (3, "roberta.encoder.layer.0.attention.self"),
    "distilbert": (3, "distilbert.transformer.layer.0.attention"),
    "vit": (3, None),
    "wav2vec2": (2, "wav2vec2.encoder.layers.0.attention"),
    "whisper": (6, "model.encoder.layers.0.self_attn"),
    "gpt2": (3, "transformer.h.0.attn"),
    "t5": (3, "encoder.block.0.layer.0.SelfAttention"),
    "llama": (3, "model.layers.0.self_attn"),
    "mistral": (3, "model.layers.0.self_attn"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_attentions_are_found_with_their_heads(family: str) -> None:
    model, _ = make(family)
    attentions = find_attentions(model)
    count, first = ATTENTIONS[family]
    assert len(attentions) == count
    assert first is None or attentions[0].name == first
    assert {(found.heads, found.kv_heads, found.head_dim) for found in attentions} == {
        (4, 2 if family in ("llama", "mistral") else 4, 16)
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_removed_heads_equal_masked_output_columns(family: str, attention: str) -> None:
    model, inputs = make(family, attention)
    small = copy.deepcopy(model)
    original = logits(model, inputs)
    for number, found in enumerate(find_attentions(model)):
        # Another choice in every layer; of grouped heads one of two.
        removed = [number % found.units] + ([found.units - 1] if number % 2 and found.units > 2 else [])
        remove_heads(small, found, removed)
        for name, columns in found.columns(removed).items():
            layer = model.get_submodule(name)
            weight = layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.t()
            weight[:, columns] = 0
    expected = logits(model, inputs)
    assert (original - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits(small, inputs), expected, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_heads_can_be_removed_twice() -> None:
    model, inputs = make("llama", num_key_value_heads=4, num_attention_heads=8)
    once = copy.deepcopy(model)
    remove_heads(once, find_attentions(once)[1], [0, 2])
    for unit in (0, 1):  # After the first, the former unit 2 is unit 1.
        remove_heads(model, find_attentions(model)[1], [unit])
    assert find_attentions(model)[1].units == 2
    assert torch.equal(logits(once, inputs), logits(model, inputs))


def test_conv1d_becomes_an_equal_linear_layer_whose_heads_can_be_removed() -> None:
    model, inputs = make("gpt2")
    linear = copy.deepcopy(model)
    replace_conv1d(linear)
    assert not [module for module in linear.modules() if type(module).__name__ == "Conv1D"]
    torch.testing.assert_close(logits(linear, inputs), logits(model, inputs), rtol=0, atol=1e-6)
    for network in (model, linear):
        remove_heads(network, find_attentions(network)[0], [1, 3])
    attention = find_attentions(linear)[0]
    assert attention.query == attention.key == attention.value == "transformer.h.0.attn.c_attn"
    assert linear.get_submodule(attention.query).weight.shape == (3 * 32, 64)
    torch.testing.assert_close(logits(linear, inputs), logits(model, inputs), rtol=0, atol=1e-6)


def test_gpt2_cross_attention_is_found_beside_its_own() -> None:
    model, inputs = make("gpt2", add_cross_attention=True)
    states = {"encoder_hidden_states": torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))}
    cross = next(found for found in find_attentions(model) if found.query != found.key)
    assert cross.query.endswith("crossattention.q_attn")
    small = copy.deepcopy(model)
    remove_heads(small, cross, [2])
    model.get_submodule(cross.output).weight.data[32:48] = 0
    torch.testing.assert_close(logits(small, inputs | states), logits(model, inputs | states), rtol=0, atol=1e-5)


def test_t5_stacks_lose_their_heads_as_a_whole() -> None:
    model, _ = make("t5")
    encoder, decoder, cross = find_attentions(model)
    assert [len(found.members) for found in (encoder, decoder, cross)] == [2, 2, 2]
    assert [found.position_bias is None for found in (encoder, decoder, cross)] == [False, False, True]
    remove_heads(model, encoder, [0])
    assert [layer.embedding_dim for name, layer in model.named_modules() if "attention_bias" in name] == [3, 4]


def test_bias_from_outside_and_parameters_for_each_head_are_left_alone() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    image = {"image_size": 16, "patch_size": 8}
    own, shared = (
        transformers.BeitModel(transformers.BeitConfig(**sizes, **image, **{f"use_{key}relative_position_bias": True}))
        for key in ("", "shared_")
    )
    swin = transformers.SwinModel(transformers.SwinConfig(image_size=32, embed_dim=16, depths=[1], num_heads=[2]))
    olmo = transformers.Olmo2Model(transformers.Olmo2Config(vocab_size=50, **sizes))  # Norms over all heads at once.
    assert [find_attentions(model) for model in (own, shared, swin, olmo)] == [()] * 4
    assert [list(attentions_left_whole(model, ())) for model in (own, swin, olmo)] == [
        ["layers.0.attention"],
        ["encoder.layers.0.blocks.0.attention"],
        ["layers.0.self_attn"],
    ]
    moonshine = transformers.MoonshineModel(transformers.MoonshineConfig(vocab_size=50, hidden_size=32))
    assert find_attentions(moonshine) == ()  # Its config tells how many heads there are.
    plain = transformers.BeitModel(transformers.BeitConfig(**sizes, **image))
    assert len(find_attentions(plain)) == 1
    assert attentions_left_whole(plain, find_attentions(plain)) == {}


def test_impossible_removals_are_refused() -> None:
    model, _ = make("bert")
    attention = find_attentions(model)[0]
    with pytest.raises(ConfigError, match="0 to 3 are allowed"):
        remove_heads(model, attention, [4])
    with pytest.raises(ConfigError, match="one has to stay"):
        remove_heads(model, attention, range(4))


_SIZES = {"hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
_RELATIVE = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("GPTNeoX", _SIZES, 2),
        ("Phi", {**_SIZES, "num_key_value_heads": 3, "qk_layernorm": True, "partial_rotary_factor": 0.4}, 2),
        ("Albert", {**_SIZES, "embedding_size": 12}, 1),
        ("ModernBert", {**_SIZES, "pad_token_id": 0}, 2),
        ("DebertaV2", {**_SIZES, **_RELATIVE, "share_att_key": True}, 2),
        ("DebertaV2", {**_SIZES, **_RELATIVE, "share_att_key": False}, 2),
        ("MPNet", _SIZES, 1),  # One bias of positions for all layers.
        (
            "GPTNeo",
            {"hidden_size": 60, "num_layers": 2, "num_heads": 6, "attention_types": [[["global", "local"], 1]]},
            2,
        ),
        ("RoFormer", {**_SIZES, "embedding_size": 60}, 2),
        ("GPTJ", {"n_embd": 60, "n_layer": 2, "n_head": 6, "rotary_dim": 4}, 2),
    ],
)
def test_other_forms_of_attention_lose_whole_heads(name: str, changes: dict[str, Any], count: int) -> None:
    import transformers

    tokens = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=50, **changes)
    model = getattr(transformers, f"{name}Model")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    attentions = find_attentions(model)
    assert [(found.heads, found.head_dim) for found in attentions] == [(6, 10)] * count
    small = copy.deepcopy(model)
    with torch.no_grad():
        original = model(tokens).last_hidden_state
        for found in attentions:
            remove_heads(small, found, [1])
            width = 10 * found.heads // found.units
            for member in found.members:
                model.get_submodule(member.output).weight[:, width : 2 * width] = 0
        expected = model(tokens).last_hidden_state
        assert (original - expected).abs().max() > 1e-2
        torch.testing.assert_close(small(tokens).last_hidden_state, expected, rtol=0, atol=1e-5)
