from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cnn_families import CNNS, SIZE, make_cnn
from torch import nn

import ray_nascomp as nc
from ray_nascomp.architecture import elastic_cnn
from ray_nascomp.architecture.cnn_specs import Reduction
from ray_nascomp.architecture.residual import crop_kernel, kernel_sizes, residual_blocks
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.space import Space
from ray_nascomp.tasks.calling import call

FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name == "mobilenet_v2" else ()) for name in CNNS]


def outputs(model: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return call(model.eval(), inputs)


def whole(architecture: dict[str, Any]) -> dict[str, Any]:
    """Everything kept."""
    top = {"keep": True, "width": 1.0}
    return {
        name: {key: top.get(key, max(domain.categories) if key == "kernel" else None) for key, domain in entry.items()}
        for name, entry in architecture.items()
        if isinstance(entry, dict)
    }


def halved(architecture: dict[str, Any]) -> dict[str, Any]:
    """Half of every group's channels, the smallest kernels."""
    config = whole(architecture)
    for values in config.values():
        values |= {"width": 0.5} if "width" in values else {}
        values |= {"kernel": 3} if "kernel" in values else {}
    return config


def masked(model: nn.Module, spec: ModelSpec, build: Any, config: dict[str, Any]) -> nn.Module:
    """The whole model with zeros where an architecture has removed channels and the edges of kernels."""
    network = copy.deepcopy(model)
    reduction = Reduction.of(build.parts, config)
    with torch.no_grad():
        for layer in spec.layers:
            module: Any = network.get_submodule(layer.name)
            group = layer.out_group or (layer.in_groups[0][0] if layer.kind == "batch_norm" else None)
            if count := reduction.units.get(group, 0):
                gone = build.ranking[group][-count:]
                module.weight[gone] = 0
                if module.bias is not None:
                    module.bias[gone] = 0
            if (size := reduction.kernels.get(layer.name)) is not None:
                edge = (module.kernel_size[0] - size) // 2
                centre = torch.zeros_like(module.weight)
                centre[..., edge : edge + size, edge : edge + size] = 1
                module.weight.mul_(centre)
    return network


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_exact_and_removed_equals_masked(family: str) -> None:
    model, inputs = make_cnn(family)
    build, architecture = elastic_cnn(model, inputs)
    expected = outputs(model, inputs)
    assert torch.equal(outputs(build(whole(architecture)), inputs), expected)
    config = halved(architecture)
    network = build(config)
    hidden = outputs(masked(model, ModelSpec.from_model(model, inputs), build, config), inputs)
    assert (hidden - expected).abs().max() > 1e-3
    torch.testing.assert_close(outputs(network, inputs), hidden, rtol=1e-6, atol=1e-5)
    assert sum(p.numel() for p in network.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_left_out_are_passed_by(family: str) -> None:
    model, inputs = make_cnn(family)
    blocks = residual_blocks(model, inputs)
    assert len(blocks) == CNNS[family][3]
    if not blocks:
        return
    build, architecture = elastic_cnn(model, inputs, widths=(), kernels=False)
    assert list(architecture) == list(blocks)
    network = build({blocks[0]: {"keep": False}})
    passed_by = copy.deepcopy(model)
    passed_by.get_submodule(blocks[0]).forward = lambda x: x  # type: ignore[method-assign]
    expected = outputs(passed_by, inputs)
    assert (expected - outputs(model, inputs)).abs().max() > 1e-3
    assert torch.equal(outputs(network, inputs), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_structures_equal_those_of_traced_networks(family: str) -> None:
    model, inputs = make_cnn(family)
    build, architecture = elastic_cnn(model, inputs, resolutions=(16,))
    specs = build.specs(ModelSpec.from_model(model, inputs))
    rng = np.random.default_rng(3)
    space = Space({"architecture": architecture})
    configs = [space.sample(rng)["architecture"] for _ in range(2)]
    for config, size in zip(configs, (16, SIZE), strict=True):
        config["resolution"] = size
        network = build(config)
        told = specs(config)
        assert told == ModelSpec.from_model(network, inputs)
        params = sum(math.prod(layer.weight_shape) + layer.bias * layer.weight_shape[0] for layer in told.layers)
        assert params == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_saved_folders_do_what_the_network_does(family: str, tmp_path: Path) -> None:
    model, inputs = make_cnn(family)
    build, architecture = elastic_cnn(model, inputs, resolutions=(24,))
    config = halved(architecture) | {"resolution": 24}
    for block in list(config)[:1]:
        if "keep" in architecture[block]:
            config[block]["keep"] = False
    network = build(config)
    expected = outputs(network, inputs)
    images = inputs if isinstance(inputs, torch.Tensor) else inputs["pixel_values"]
    session = onnxruntime.InferenceSession(export_onnx(network, inputs, ("pixel_values",)).SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-4)
    if family == "own":
        return
    import transformers

    task = nc.HuggingFaceTask(model, {"train": (images, torch.arange(2)), "validation": (images, torch.arange(2))})
    task.save_pretrained(network, tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(outputs(loaded, inputs), expected, rtol=1e-6, atol=1e-6)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in network.parameters())


def test_the_channels_that_matter_stay() -> None:
    model, inputs = make_cnn("own")
    build, _ = elastic_cnn(model, inputs, widths=(0.25, 1.0))
    filters = model.get_submodule("first.0.layers.0").weight.flatten(1).norm(dim=1)
    norm: Any = model.get_submodule("first.0.layers.1")
    depthwise: Any = model.get_submodule("first.0.layers.3").weight.flatten(1).norm(dim=1)
    second: Any = model.get_submodule("first.0.layers.4")
    score = filters * norm.weight / (norm.running_var + norm.eps).sqrt()
    score = score + depthwise * second.weight / (second.running_var + second.eps).sqrt()
    kept = score.argsort(descending=True)[:6].sort().values
    network = build({"first.0": {"keep": True, "width": 0.25}})
    assert torch.equal(
        network.get_submodule("first.0.layers.0").weight, model.get_submodule("first.0.layers.0").weight[kept]
    )


def test_a_task_ranks_channels_by_its_loss() -> None:
    model, inputs = make_cnn("own")
    images, labels = torch.randn(32, 3, SIZE, SIZE), torch.arange(32) % 3
    with torch.no_grad():
        model.get_submodule("head").weight[:, :8] = 0  # Nothing reads the first channels of the last stage.
        for block in ("second.0", "second.1"):
            model.get_submodule(f"{block}.layers.0").weight[:, :8] = 0
    task = nc.Task(model, (images, labels), (images, labels))
    by_loss, _ = elastic_cnn(model, inputs, task=task)
    assert set(by_loss.ranking["down.0"][-8:]) == set(range(8))
    by_weight, _ = elastic_cnn(model, inputs)
    assert set(by_weight.ranking["down.0"][-8:]) != set(range(8))


def test_a_huggingface_task_is_searched_compressed_and_saved(tmp_path: Path) -> None:
    model, inputs = make_cnn("resnet")
    images, labels = torch.randn(32, 3, SIZE, SIZE), torch.arange(32) % 3
    task = nc.HuggingFaceTask(model, {"train": (images, labels), "validation": (images, labels)}).elastic()
    space = nc.compression_space(task)
    assert "keep" in space["architecture"]["resnet.encoder.stages.1.layers.1"]
    costs = nc.CostModel(task)
    config = {"architecture": Space(space).sample(np.random.default_rng(0))["architecture"]}
    config["architecture"]["resnet.encoder.stages.1.layers.1"] = {"keep": True, "width": 0.5}
    config |= {"prune": {"sparsity": 0.25}, "quantize": {"bits": 8}}
    step = nc.compress(task, config, epochs=0)
    assert step.metrics["feasible"]
    network = step.run.candidate.network
    assert costs(config)["params"] == sum(parameter.numel() for parameter in network.parameters())
    step.save(tmp_path)
    loaded = nc.load(tmp_path, task.network(config["architecture"]))
    torch.testing.assert_close(outputs(loaded, inputs), outputs(network, inputs), rtol=1e-6, atol=1e-6)


def test_a_supernet_shares_the_weights_of_convolutions() -> None:
    model, inputs = make_cnn("own")
    build, architecture = elastic_cnn(model, inputs, resolutions=(16,))
    data = torch.randn(32, 3, SIZE, SIZE), torch.arange(32) % 3
    task = nc.Task(model, data, data, build=build, architecture=architecture)
    trained = nc.train_supernet(task, epochs=1, show_progress=False)
    network = trained.network(Space({"architecture": architecture}).sample(np.random.default_rng(0))["architecture"])
    last = trained.model.get_submodule("head").bias
    assert torch.equal(network.get_submodule("head").bias, last)
    assert not torch.equal(last, model.get_submodule("head").bias)


def test_kernels_are_cropped_only_where_outputs_stay_in_place() -> None:
    assert kernel_sizes(nn.Conv2d(1, 1, 7, padding=3)) == (3, 5, 7)
    assert kernel_sizes(nn.Conv2d(1, 1, 7, padding=1)) == (5, 7)
    assert kernel_sizes(nn.Conv2d(1, 1, 7)) == kernel_sizes(nn.Conv2d(1, 1, 7, padding=3, padding_mode="reflect"))
    assert kernel_sizes(nn.Conv2d(1, 1, (3, 5), padding=1)) == (3,)
    assert kernel_sizes(nn.Conv2d(1, 1, 4, padding=2)) == (4,)
    for layer in (nn.Conv2d(2, 2, 5, padding=4, dilation=2, stride=2), nn.Conv2d(2, 2, 5, padding="same")):
        images = torch.randn(1, 2, 9, 9)
        edgeless = copy.deepcopy(layer)
        edgeless.weight.data[..., [0, 4], :] = edgeless.weight.data[..., [0, 4]] = 0
        crop_kernel(layer, 3)
        torch.testing.assert_close(layer(images), edgeless(images))


def test_what_cannot_be_searched_is_refused() -> None:
    model, inputs = make_cnn("own")
    with pytest.raises(ConfigError, match="resolutions: \\[64\\] was given, whole numbers from 1 to 32"):
        elastic_cnn(model, inputs, resolutions=(64,))
    with pytest.raises(ConfigError, match="nothing is left to search"):
        elastic_cnn(model, inputs, widths=(), depth=False, kernels=False)
    flat = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 3))
    with pytest.raises(ConfigError, match="resolutions: 24 was given, at which a Sequential does not run"):
        elastic_cnn(flat, inputs, resolutions=(24,))
