from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformer_families import FAMILIES, logits, make, whole

import ray_nascomp as nc
from ray_nascomp.architecture import elastic_transformer
from ray_nascomp.architecture.blocks import find_blocks
from ray_nascomp.compression.attention import find_attentions
from ray_nascomp.errors import ConfigError
from ray_nascomp.space import Space
from ray_nascomp.tasks.transport import pack, unpack

BLOCKS = {"wav2vec2": 2, "whisper": 4, "t5": 4}


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """The weight with a row an output."""
    layer: Any = model.get_submodule(name)
    return layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.t()


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_equals_the_model_exactly(family: str) -> None:
    model, inputs = make(family, "sdpa")
    build, architecture = elastic_transformer(model)
    assert len(architecture) == len(build.blocks) == BLOCKS.get(family, 3)
    assert all(block.feed_forward is not None and block.feed_forward.width == 96 for block in build.blocks)
    network = build(whole(architecture))
    assert torch.equal(logits(network, inputs), logits(model, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_parts_equal_masked_ones(family: str) -> None:
    model, inputs = make(family)
    build, architecture = elastic_transformer(model)
    config = whole(architecture)
    for number, (block, dimensions) in enumerate(architecture.items()):
        for key, domain in dimensions.items():
            if key != "keep":
                config[block][key] = domain.categories[number % 2]
    network = build(config)
    masked = copy.deepcopy(model)
    for block in build.blocks:
        values = config[block.name]
        for key, attention in zip(("heads", "cross_heads"), block.attentions, strict=False):
            removed = build.ranking[attention.name][values.get(key, attention.units) :]
            for name, columns in attention.columns(removed).items():
                weight_of(masked, name)[:, columns] = 0
        removed = build.ranking[block.feed_forward.contract][values["width"] :]
        weight_of(masked, block.feed_forward.contract)[:, removed] = 0
    expected = logits(masked, inputs)
    assert (expected - logits(model, inputs)).abs().max() > 1e-2
    torch.testing.assert_close(logits(network, inputs), expected, rtol=0, atol=1e-5)
    smallest = min(found.units for found in find_attentions(network))
    assert smallest == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_left_out_equals_one_that_is_passed_by(family: str) -> None:
    model, inputs = make(family)
    build, architecture = elastic_transformer(model)
    config = whole(architecture)
    gone = next(name for name, values in config.items() if "keep" in values)
    config[gone]["keep"] = False
    network = build(config)
    passed_by = copy.deepcopy(model)
    block = passed_by.get_submodule(gone)
    if family == "t5":
        block.forward = lambda states, mask=None, bias=None, *rest, **others: (states, bias, *rest[1:2])  # type: ignore[method-assign]
    else:
        block.forward = lambda states, *rest, **others: states  # type: ignore[method-assign]
    expected = logits(passed_by, inputs)
    assert (expected - logits(model, inputs)).abs().max() > 1e-2
    torch.testing.assert_close(logits(network, inputs), expected, rtol=0, atol=1e-5)
    names = {name for name, _ in network.named_modules()}
    assert gone not in names
    assert {block.name for block in find_blocks(network)} == set(config) - {gone}  # The others keep their names.
    assert {block.name for block in find_blocks(model)} == set(config)


def test_a_decoder_with_fewer_blocks_generates() -> None:
    model, inputs = make("llama")
    build, architecture = elastic_transformer(model)
    config = whole(architecture)
    config["model.layers.1"]["keep"] = False
    network = build(config)
    assert network.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 3
    ids = inputs["input_ids"][:1]
    with torch.no_grad():
        cached = network.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
        plain = network.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, plain)


def test_the_best_heads_and_neurons_stay() -> None:
    model, inputs = make("bert", num_labels=2)
    quiet = model.bert.encoder.layer[1]
    with torch.no_grad():
        quiet.attention.output.dense.weight[:, 16:32] *= 0.01  # The second head hardly speaks,
        quiet.output.dense.weight[:, 8:] *= 0.01  # nor do all neurons but the first eight.
    data = ({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}, torch.tensor([0, 1]))
    task = nc.Task(model, data, data)
    for builder, _ in (elastic_transformer(model), elastic_transformer(model, task=task)):
        network = builder({"bert.encoder.layer.1": {"keep": True, "heads": 3, "width": 8}})
        kept = network.bert.encoder.layer[1]
        assert torch.equal(kept.attention.self.value.weight[16:], quiet.attention.self.value.weight[32:])
        assert torch.equal(kept.intermediate.dense.weight, quiet.intermediate.dense.weight[:8])


def test_the_space_is_conditional_and_made_of_counts() -> None:
    model, _ = make("whisper")
    _, architecture = elastic_transformer(model, heads=(0.5, 1.0), widths=(0.5, 1.0))
    assert architecture["model.decoder.layers.1"].keys() == {"keep", "heads", "cross_heads", "width"}
    assert "keep" not in architecture["model.encoder.layers.0"]
    assert architecture["model.encoder.layers.0"]["width"].categories == [48, 96]
    space = Space({"architecture": architecture})
    assert len(space) == 2 + 3 + 3 + 4  # Two encoder blocks, two decoder blocks, the first of each without "keep".
    first = {"architecture": whole(architecture)}
    first["architecture"]["model.decoder.layers.1"]["keep"] = False
    second = copy.deepcopy(first)
    second["architecture"]["model.decoder.layers.1"]["width"] = 48
    assert space.key(first) == space.key(second)
    _, only_depth = elastic_transformer(model, heads=(), widths=())
    assert {name: set(values) for name, values in only_depth.items()} == {
        "model.encoder.layers.1": {"keep"},
        "model.decoder.layers.1": {"keep"},
    }


def test_a_task_builds_sub_networks_in_workers_from_one_set_of_weights() -> None:
    model, inputs = make("bert", num_labels=2)
    data = (dict(inputs), torch.tensor([0, 1]))
    build, architecture = elastic_transformer(model)
    task = nc.Task(model, data, data, build=build, architecture=architecture)
    packed = pack(task)
    parameters = sum(1 for _ in model.parameters())
    assert len(packed.arrays) <= parameters + len(list(model.buffers())) + 3 * len(data[0])
    arrived = unpack(packed)
    config = whole(architecture)
    assert torch.equal(logits(arrived.network(config), inputs), logits(model, inputs))
    config["bert.encoder.layer.2"] = {"keep": False, "heads": 1, "width": 24}
    assert sum(p.numel() for p in arrived.network(config).parameters()) < sum(p.numel() for p in model.parameters())


def test_what_cannot_be_elastic_is_refused() -> None:
    with pytest.raises(ConfigError, match="no transformer blocks that are known"):
        elastic_transformer(nn.Linear(2, 2))
    model, _ = make("bert")
    with pytest.raises(ConfigError, match="shares above 0 and up to 1"):
        elastic_transformer(model, heads=(0.0, 1.0))
    with pytest.raises(ConfigError, match="nothing is left to search"):
        elastic_transformer(model, heads=(), widths=(1.0,), depth=False)


def test_blocks_of_several_stages_are_left_out_one_by_one() -> None:
    import transformers

    sizes = {"hidden_sizes": [24, 36, 48], "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 64]}
    config = transformers.MobileViTConfig(image_size=32, **sizes, num_labels=3)
    torch.manual_seed(0)
    model = transformers.MobileViTForImageClassification(config).eval()
    build, architecture = elastic_transformer(model)
    assert [name for name in architecture if name.startswith("mobilevit.encoder.layer.4.")] == [
        f"mobilevit.encoder.layer.4.transformer.layer.{number}" for number in range(3)
    ]
    kept = whole(architecture)
    for values in kept.values():
        if "keep" in values:
            values["keep"] = False
    network = build(kept)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    assert len(find_attentions(network)) == 3  # Of nine, the first of each stage.
    assert logits(network, inputs).isfinite().all()
