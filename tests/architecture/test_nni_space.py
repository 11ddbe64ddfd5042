from __future__ import annotations

import warnings
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ray_nascomp as nc
from ray_nascomp.architecture import nni_space
from ray_nascomp.errors import ConfigError
from ray_nascomp.space import Space
from ray_nascomp.space.dimensions import Dimension

pytest.importorskip("pytorch_lightning", reason="nni.nas needs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nni
    from nni.mutable import ExpressionConstraint, Numerical, label_scope
    from nni.nas.nn.pytorch import InputChoice, LayerChoice, ModelSpace, MutableConv2d, MutableLinear, Repeat


class HandWritten(ModelSpace):
    """Every kind of mutable: nested choices, depth, inputs, numbers, a constraint."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        width = nni.choice("width", [24, 8, 16])
        kernel = nni.choice("kernel", [(1, 1), (3, 3)])
        self.stem = MutableConv2d(3, width, kernel, padding="same")
        self.blocks = Repeat(lambda i: self.block(i, width), (1, 3), label="depth")
        self.inputs = InputChoice(3, None, label="inputs")
        self.pair = InputChoice(3, 2, label="pair")
        self.drop = LayerChoice(
            {"none": nn.Identity(), "some": LayerChoice([nn.Dropout(0.1), nn.ReLU()], label="which")}, label="drop"
        )
        self.hidden = MutableLinear(width * 2, Numerical(8, 32, quantize=8, label="hidden").int())
        self.head = MutableLinear(Numerical(8, 32, quantize=8, label="hidden").int(), classes)
        self.rate = self.add_mutable(Numerical(0.1, 10.0, log_distributed=True, label="rate"))
        self.fixed = self.add_mutable(nni.choice("fixed", [7]))
        self.add_mutable(ExpressionConstraint(width + nni.choice("shift", [0, 100]) < 120, label="small"))

    @staticmethod
    def block(index: int, width: Any) -> nn.Module:
        convolutions = {"conv3": MutableConv2d(width, width, 3, padding=1), "skip": nn.Identity()}
        with label_scope("block"):
            return LayerChoice(convolutions, label=str(index))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        chosen = self.inputs([x, x * 2, x * 3])
        pair = self.pair([x, x * 2, x * 3])
        features = torch.cat([x if chosen is None else x + chosen, pair], 1).mean((2, 3))
        return self.head(torch.relu(self.hidden(self.drop(features))))


def dimensions(architecture: dict[str, Any]) -> dict[str, Dimension]:
    return {"/".join(d.path[1:]): d for d in Space({"architecture": architecture}).dimensions}


def test_mutables_become_dimensions_with_conditions() -> None:
    build, architecture = nni_space(HandWritten())
    found = dimensions(architecture)
    assert set(found) == {
        "width", "kernel", "depth", "block.0", "block.1", "block.2", "inputs/0", "inputs/1", "inputs/2", "pair",
        "drop", "which", "hidden", "rate", "shift",
    }  # fmt: skip
    assert found["width"].categories == (8, 16, 24)
    assert found["kernel"].categories == ("(1, 1)", "(3, 3)")
    assert found["pair"].categories == ("0+1", "0+2", "1+2")
    assert found["inputs/1"].categories == (True, False)
    assert (found["hidden"].lower, found["hidden"].upper, found["hidden"].step) == (8, 32, 8)
    assert (found["rate"].lower, found["rate"].upper, found["rate"].log) == (0.1, 10.0, True)
    depth = ("architecture", "depth")
    conditions = {name: dimension.condition for name, dimension in found.items() if dimension.condition is not None}
    assert conditions == {
        "block.1": (depth, (2, 3)),
        "block.2": (depth, (3,)),
        "which": (("architecture", "drop"), ("some",)),
    }
    assert build.default["width"] == 24
    assert build.default["inputs"] == {"0": True, "1": True, "2": True}
    assert "fixed" not in build.default


def test_networks_are_those_of_nni() -> None:
    build, architecture = nni_space(HandWritten(classes=4))
    images = torch.randn(2, 3, 8, 8)
    rng = np.random.default_rng(0)
    built = 0
    for _ in range(8):
        config = Space({"architecture": architecture}).sample(rng)["architecture"]
        if config["shift"] + config["width"] >= 120:
            with pytest.raises(nc.InfeasibleError, match="is not satisfied"):
                build(config)
            continue
        network = build(config)
        built += 1
        assert network(images).shape == (2, 4)
        assert network.get_submodule("stem").out_channels == config["width"]
        assert network.get_submodule("stem").kernel_size == ((3, 3) if config["kernel"] == "(3, 3)" else (1, 1))
        assert len(network.get_submodule("blocks")) == config["depth"]
        assert network.get_submodule("hidden").out_features == config["hidden"]
        assert network.get_submodule("inputs").chosen == [i for i in range(3) if config["inputs"][str(i)]]
        assert network.get_submodule("pair").chosen == [int(i) for i in config["pair"].split("+")]
        assert build.sample(config)["fixed"] == 7
    assert built >= 4


def test_a_network_has_its_own_randomness() -> None:
    build, _ = nni_space(HandWritten())
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first = build(build.default).state_dict()
    assert torch.equal(torch.randn(3), expected)
    again = cloudpickle.loads(cloudpickle.dumps(build))(build.default).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    other = build({**build.default, "depth": 2}).state_dict()
    assert not torch.equal(other["stem.weight"], first["stem.weight"])


def test_a_space_is_searched_with_its_compression() -> None:
    build, architecture = nni_space(HandWritten())
    first = {**build.default, "depth": 3}
    data = torch.randn(32, 3, 8, 8), torch.arange(32) % 3
    task = nc.Task(build(first), data, data, build=build, architecture=architecture)
    space = nc.compression_space(task, sparsities="uniform")
    assert space["architecture"] == architecture
    config = {"architecture": {**first, "width": 16, "block.1": "skip"}, "prune": {"sparsity": 0.5}}
    config |= {"quantize": {"bits": 8}}
    step = nc.compress(task, config, epochs=0)
    assert step.metrics["feasible"]
    network = step.run.candidate.network
    assert nc.CostModel(task)(config)["params"] == sum(parameter.numel() for parameter in network.parameters())
    assert network.get_submodule("stem").out_channels == 8
    broken = {"architecture": {**first, "shift": 100}}
    assert "is not satisfied" in nc.compress(task, broken, epochs=0).metrics["reason"]


def test_cells_of_nasbench101_depend_on_their_number_of_nodes() -> None:
    from nni.nas.hub.pytorch import NasBench101

    build, architecture = nni_space(NasBench101(stem_out_channels=8, num_stacks=1, num_modules_per_stack=1))
    found = dimensions(architecture)
    count = ("architecture", "cell.num_nodes")
    assert found["cell.op5"].condition == (count, (7,))
    assert found["cell.op1"].condition == (count, (3, 4, 5, 6, 7))
    assert found["cell.input6/0"].condition == (count, (7,))
    assert found["cell.input1/0"].condition == (count, (2, 3, 4, 5, 6, 7))
    assert build(build.default)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_what_is_no_model_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="a Linear was given, an instance of an"):
        nni_space(nn.Linear(1, 1))

    class Nothing(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

    with pytest.raises(ConfigError, match="nothing to choose from"):
        nni_space(Nothing())
