from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from candidates import candidate_of
from networks import PlainNet
from torch import nn

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError

DATA = (torch.randn(64, 1, 8, 8), torch.arange(64) % 10)


@pytest.fixture
def own_parts():
    """A pruner, a quantizer and a stage, registered for one test."""

    @nc.register("last_first")
    class LastFirst(nc.Pruner):
        def importance(self, model, task, groups, seed):
            return {name: -np.arange(group.width) for name, group in groups.items()}

    @nc.register("clipped")
    class Clipped(nc.Quantizer):
        bits = (4, 8)

        def scale(self, weight, largest):
            flat = np.abs(weight).reshape(len(weight), -1)
            return np.quantile(flat, 0.98, axis=1) / largest

    @nc.register("narrow")
    class Narrow(nc.Stage):
        """Makes the hidden layer as narrow as told."""

        def dimensions(self, spec):
            from ray import tune

            return {"width": tune.choice([8, 20])}

        def validate(self, section, spec):
            width = section.get("width", 20)
            if width not in (8, 20):
                raise ConfigError(f"narrow.width: {width!r} was given, 8 or 20 is allowed")
            return {} if width == 20 else {"width": width}

        def apply(self, network, task, options, seed):
            width = options["width"]
            hidden, head = nn.Linear(network.hidden.in_features, width), nn.Linear(width, 10)
            hidden.weight.data, hidden.bias.data = network.hidden.weight.data[:width], network.hidden.bias.data[:width]
            head.weight.data, head.bias.data = network.head.weight.data[:, :width], network.head.bias.data
            network.hidden, network.head = hidden, head
            return network

        def specify(self, spec, options):
            width = options["width"]
            layers = []
            for layer in spec.layers:
                if layer.name == "hidden":
                    layer = replace(layer, weight_shape=(width, layer.weight_shape[1]))
                if layer.name == "head":
                    layer = replace(layer, weight_shape=(10, width))
                layers.append(layer)
            groups = [replace(group, width=width) if group.name == "hidden" else group for group in spec.groups]
            return replace(spec, layers=tuple(layers), groups=tuple(groups))


@pytest.fixture
def task():
    torch.manual_seed(0)
    return nc.Task(PlainNet(), DATA, DATA)


def test_an_own_pruner_chooses_what_goes(own_parts, task):
    candidate = candidate_of(task, {"prune": {"method": "last_first", "sparsity": {"blocks.0.0": 0.25}}})
    assert candidate.removed == {"blocks.0.0": [6, 7]}


def test_an_own_quantizer_sets_the_scales(own_parts, task):
    config = {"quantize": {"method": "clipped", "bits": {"hidden": 4}}}
    run = nc.compress(task, config, epochs=0).run

    scales = {
        i.name: onnx.numpy_helper.to_array(i) for i in onnx.load_from_string(run.artifact.content).graph.initializer
    }
    weight = np.abs(task.model.hidden.weight.detach().numpy())
    expected = np.quantile(weight, 0.98, axis=1) / 7
    assert any(value.size == 20 and np.allclose(value.flatten(), expected, rtol=1e-5) for value in scales.values())
    with pytest.raises(ConfigError, match="allowed: 4, 8, 32"):
        nc.compress(task, {"quantize": {"method": "clipped", "bits": 2}}, epochs=0)


def test_an_own_stage_has_dimensions_costs_and_a_place(own_parts, task):
    space = nc.compression_space(task)
    assert set(space["narrow"]) == {"width"}
    assert "last_first" in space["prune"]["method"].categories
    config = {"narrow": {"width": 8}, "prune": {"sparsity": {"hidden": 0.5, "blocks.0.0": 0.5}}}
    costs = nc.CostModel(task)
    step = nc.compress(task, config, epochs=1)
    assert step.metrics["feasible"]
    assert (
        costs(config)["params"]
        == step.metrics["params"]
        == sum(p.numel() for p in step.run.candidate.network.parameters())
    )
    assert step.run.candidate.network.hidden.out_features == 4
    with pytest.raises(ConfigError, match="order"):
        nc.CompressionPlan.from_config({"order": ["prune", "low_rank"]}, task.spec)


def test_what_is_registered_travels_with_a_task(own_parts, task, tmp_path):
    import cloudpickle
    import networks

    cloudpickle.register_pickle_by_value(networks)
    path = tmp_path / "task"
    path.write_bytes(cloudpickle.dumps(task))
    cloudpickle.unregister_pickle_by_value(networks)
    code = (
        "import pickle; from ray_nascomp.plan import prune_methods\n"
        f"task = pickle.load(open({str(path)!r}, 'rb'))\n"
        "print(prune_methods()[-1])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert found.stdout.strip() == "last_first"


@pytest.mark.parametrize(("name", "cls"), [("l1_norm", nc.Pruner), ("two words", nc.Pruner)])
def test_names_of_ours_cannot_be_taken(name, cls):
    with pytest.raises(ConfigError, match="identifier"):
        nc.register(name)


def test_only_parts_can_be_registered():
    with pytest.raises(ConfigError, match="Pruner, a Quantizer or a Stage"):
        nc.register("something")(dict)
