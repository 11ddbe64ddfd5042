from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformer_families import FAMILIES, logits, make, whole

import ray_nascomp as nc
from ray_nascomp.architecture import elastic_transformer, save_network
from ray_nascomp.architecture.pretrained import CODE_FILE
from ray_nascomp.compression.attention import replace_conv1d
from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.transport import pack, unpack

AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "roberta": "AutoModelForSequenceClassification",
    "distilbert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "wav2vec2": "AutoModelForAudioClassification",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "gpt2": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "llama": "AutoModelForCausalLM",
    "mistral": "AutoModelForCausalLM",
}


def load(family: str, folder: Path, **arguments: Any) -> nn.Module:
    import transformers

    return getattr(transformers, AUTO[family]).from_pretrained(folder, **arguments).eval()


def sub_network(family: str, uneven: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A sub-network without a block, with narrower feed-forwards: all alike, or each its own with its own heads."""
    model, inputs = make(family, "sdpa")
    build, architecture = elastic_transformer(model)
    config = whole(architecture)
    blocks = list(config.values())
    next(values for values in blocks if "keep" in values)["keep"] = False
    for values in blocks:
        values["width"] = 48
    if uneven:
        blocks[0] |= {"heads": 1, "width": 24}
    return build(config), inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_layers_load_plainly(family: str, tmp_path: Path) -> None:
    network, inputs = sub_network(family, uneven=False)
    replace_conv1d(network)
    assert save_network(network, tmp_path, AUTO[family], use_cache=True)
    loaded = load(family, tmp_path)
    assert type(loaded) is type(network)
    torch.testing.assert_close(logits(loaded, inputs), logits(network, inputs), rtol=0, atol=1e-6)
    assert not (tmp_path / CODE_FILE).exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_layers_load_with_the_code_beside_them(family: str, tmp_path: Path) -> None:
    network, inputs = sub_network(family, uneven=True)
    replace_conv1d(network)
    assert not save_network(network, tmp_path, AUTO[family], use_cache=True)
    loaded = load(family, tmp_path, trust_remote_code=True)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in network.parameters())
    torch.testing.assert_close(logits(loaded, inputs), logits(network, inputs), rtol=0, atol=1e-6)


def test_what_was_loaded_can_be_compressed_and_saved_again(tmp_path: Path) -> None:
    network, inputs = sub_network("bert", uneven=True)
    save_network(network, tmp_path / "first", AUTO["bert"], use_cache=False)
    loaded = load("bert", tmp_path / "first", trust_remote_code=True)
    build, architecture = elastic_transformer(loaded)
    smaller = build({**whole(architecture), "bert.encoder.layer.1": {"keep": True, "heads": 2, "width": 16}})
    save_network(smaller, tmp_path / "second", AUTO["bert"], use_cache=False)
    again = load("bert", tmp_path / "second", trust_remote_code=True)
    torch.testing.assert_close(logits(again, inputs), logits(smaller, inputs), rtol=0, atol=1e-6)


def test_wav2vec2_travels_and_is_saved_with_its_weight_norm(tmp_path: Path) -> None:
    model, inputs = make("wav2vec2", "sdpa")
    data = (inputs["input_values"], torch.tensor([0, 1]))
    task = nc.HuggingFaceTask(model, {"train": data, "validation": data})
    expected = logits(model, inputs)
    arrived = unpack(pack(task))
    torch.testing.assert_close(logits(arrived.model, inputs), expected, rtol=0, atol=1e-6)
    task.save_pretrained(task.network({}), tmp_path)
    assert not (tmp_path / CODE_FILE).exists()
    torch.testing.assert_close(logits(load("wav2vec2", tmp_path), inputs), expected, rtol=0, atol=1e-6)
    assert is_parametrized(model.wav2vec2.encoder.pos_conv_embed.conv)  # The user's model is as it was.


def test_the_saved_folder_needs_no_ray_nascomp(tmp_path: Path) -> None:
    network, _ = sub_network("bert", uneven=True)
    save_network(network, tmp_path, AUTO["bert"], use_cache=False)
    code = (
        "import sys; sys.modules['ray_nascomp'] = None\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "print(sum(p.numel() for p in model.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(done.stdout.split()[-1]) == sum(p.numel() for p in network.parameters())


def test_heads_of_one_number_load_plainly_where_the_config_knows_their_size(tmp_path: Path) -> None:
    for family, is_plain in (("llama", True), ("vit", True), ("t5", True), ("bert", False)):
        model, inputs = make(family, "sdpa")
        build, architecture = elastic_transformer(model, widths=())
        config = whole(architecture)
        for values in config.values():
            values |= {key: 1 for key in values if key != "keep"}
        network = build(config)
        folder = tmp_path / family
        assert save_network(network, folder, AUTO[family], use_cache=True) is is_plain
        loaded = load(family, folder, **({} if is_plain else {"trust_remote_code": True}))
        torch.testing.assert_close(logits(loaded, inputs), logits(network, inputs), rtol=0, atol=1e-6)


def test_weights_that_transformers_renames_are_found_again(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=50, **sizes)).eval()
    build, architecture = elastic_transformer(model)
    config = whole(architecture)
    config["gpt_neox.layers.0"] |= {"heads": 2, "width": 16}
    network = build(config)
    assert not save_network(network, tmp_path, "AutoModelForCausalLM", use_cache=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    torch.testing.assert_close(logits(loaded, inputs), logits(network, inputs), rtol=0, atol=1e-6)


def test_configs_that_list_their_blocks_lose_the_same(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48}
    generator = torch.Generator().manual_seed(0)
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    tokens = {"input_ids": torch.randint(3, 40, (2, 9), generator=generator)}
    backbone = {**sizes, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    kinds = {**sizes, "num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "local"], 1]]}
    for name, config, inputs, expected in (
        ("Dinov2ForImageClassification", backbone, pixels, {"stage_names": ["stem", "stage1", "stage2"]}),
        ("GPTNeoForCausalLM", {**kinds, "vocab_size": 50}, tokens, {"attention_layers": ["global", "local"]}),
    ):
        model_class = getattr(transformers, name)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**config)).eval()
        build, architecture = elastic_transformer(model)
        kept = whole(architecture)
        next(values for values in kept.values() if "keep" in values)["keep"] = False
        network = build(kept)
        assert save_network(network, tmp_path / name, name, use_cache=False)
        loaded = model_class.from_pretrained(tmp_path / name).eval()
        assert {key: getattr(loaded.config, key) for key in expected} == expected
        torch.testing.assert_close(logits(loaded, inputs), logits(network, inputs), rtol=0, atol=1e-6)


def test_stages_of_several_widths_load_again(tmp_path: Path) -> None:
    import transformers

    pairs = {"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 2], hidden_sizes=[16, 24], num_attention_heads=[2, 3], num_labels=3, **pairs
    )
    torch.manual_seed(0)
    model = transformers.SegformerForImageClassification(config).eval()
    build, architecture = elastic_transformer(model)
    # The width is that of the depthwise convolution between the two layers as well.
    assert [set(dimensions) for dimensions in architecture.values()] == [{"heads"}, {"heads", "keep"}]
    first, second = architecture
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    for heads, is_plain in ((3, True), (1, False)):
        network = build({first: {"heads": heads}, second: {"keep": False, "heads": 3}})
        folder = tmp_path / str(heads)
        assert save_network(network, folder, "AutoModelForImageClassification", use_cache=False) is is_plain
        loaded = transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
        assert loaded.config.depths == [1, 1]
        torch.testing.assert_close(logits(loaded, inputs), logits(network, inputs), rtol=0, atol=1e-6)


def test_factors_are_saved_and_strange_layers_refused(tmp_path: Path) -> None:
    model, inputs = make("vit", "sdpa")
    layer = model.vit.layers[0].mlp
    layer.fc1 = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 96))
    assert not save_network(model, tmp_path, AUTO["vit"], use_cache=False)
    loaded = load("vit", tmp_path, trust_remote_code=True)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=1e-6)
    layer.fc1 = nn.Bilinear(64, 64, 96)
    with pytest.raises(ConfigError, match=r"vit.layers.0.mlp.fc1: a Bilinear cannot be saved"):
        save_network(model, tmp_path, AUTO["vit"], use_cache=False)


def test_a_task_saves_its_processor_and_a_card_with_figures(tmp_path: Path) -> None:
    import transformers

    model, inputs = make("vit", "sdpa")
    data = (inputs["pixel_values"], torch.tensor([0, 1]))
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    task = nc.HuggingFaceTask(model, {"train": data, "validation": data}, processor=processor).elastic()
    config = whole(task.architecture)
    config["vit.layers.0"]["heads"] = 1
    task.save_pretrained(task.network(config), tmp_path, {"accuracy": 0.75, "speedup": 2.125})
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "| speedup | 2.125 |" in card
    assert "trust_remote_code=True" in card
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {"height": 32, "width": 32}
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(logits(loaded.eval(), inputs), logits(task.network(config), inputs), rtol=0, atol=1e-6)
