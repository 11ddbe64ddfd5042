from __future__ import annotations

import pytest
import torch
from networks import NormThenReLU
from torch import nn

import ray_nascomp as nc
from ray_nascomp.compression.fold import fold_batch_norm, foldable_pairs

INPUTS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class PreActivation(nn.Module):
    """The first convolution's output goes into a normalisation and past it."""

    def __init__(self, concatenates: bool):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.BatchNorm2d(4)
        self.concatenates = concatenates
        self.head = nn.Linear(8 if concatenates else 4, 3)

    def forward(self, x):
        x = self.stem(x)
        inner = self.last(self.conv(torch.relu(self.norm(x))))
        x = torch.cat([x, inner], 1) if self.concatenates else x + inner
        return self.head(x.mean((2, 3)))


def changed_in_place() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Dropout(),
        nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


class Temporaries(nn.Module):
    """Between its layers tensors come and go, and later ones get their places in memory."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4 if number else 1, 4, 3, padding=1) for number in range(16))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(16))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)) * 0.5 + 0.1)
            x = x + x.mean((2, 3), keepdim=True)
        return x.mean((2, 3))


NETWORKS = {
    "temporaries": (Temporaries, [(f"convs.{number}", f"norms.{number}") for number in range(16)]),
    "residual": (lambda: PreActivation(concatenates=False), [("conv", "last")]),
    "dense": (lambda: PreActivation(concatenates=True), [("conv", "last")]),
    "in place": (changed_in_place, [("3", "5")]),
}


def trained(kind: str) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[kind][0]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
            nn.init.normal_(module.weight)
    return network.eval()


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_norm_is_folded_where_it_alone_reads_the_layer(kind):
    network = trained(kind)
    with torch.no_grad():
        expected = network(INPUTS)
        assert foldable_pairs(network, INPUTS) == NETWORKS[kind][1]
        fold_batch_norm(network, INPUTS)
        torch.testing.assert_close(network(INPUTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_files_of_networks_whose_norms_stay_do_what_the_networks_do(kind, tmp_path):
    import onnxruntime

    network = trained(kind)
    data = (INPUTS.repeat(4, 1, 1, 1), torch.tensor([0, 1, 2, 1] * 4))
    for quantize, tolerance in (({}, 1e-5), ({"quantize": {"bits": 8}}, 0.05)):
        step = nc.compress(nc.Task(network, data, data), quantize, epochs=0)
        session = onnxruntime.InferenceSession(step.artifact.content)
        found = torch.tensor(session.run(None, {session.get_inputs()[0].name: INPUTS.numpy()})[0])
        expected = network(INPUTS).detach()
        assert (found - expected).norm() < tolerance * expected.norm()


def test_bytes_of_norms_that_stay_shrink_with_what_they_norm():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64 * 36, 3)
    )
    nn.init.normal_(network[2].running_mean)
    nn.init.uniform_(network[2].running_var, 0.2, 3.0)
    data = (INPUTS.repeat(4, 1, 1, 1), torch.tensor([0, 1, 2, 1] * 4))
    task = nc.Task(network.eval(), data, data)
    config = {"prune": {"sparsity": 0.9}}
    size = len(nc.compress(task, config, epochs=0).artifact.content)
    assert nc.CostModel(task)(config)["size_mb"] * 1e6 == pytest.approx(size, rel=0.01)


class Halved(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(("norm", "folded"), [(NormThenReLU, True), (Halved, False)])
def test_norms_that_do_more_keep_what_they_do(norm, folded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 4, 3), norm(4)).train()
    inputs = torch.randn(16, 3, 8, 8)
    model(inputs)
    model.eval()
    expected = model(inputs)
    fold_batch_norm(model, inputs)
    assert (model(inputs) - expected).abs().max() < 1e-5
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) != folded
