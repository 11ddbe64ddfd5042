from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ray_nascomp.compression import observe
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.compression.patches import parts_and_width, sample_patches
from ray_nascomp.compression.rounding import channel_scales, round_nearest
from ray_nascomp.compression.static import calibrate_layers


class PaddedConv(nn.Conv2d):
    """Pads by itself, more at the end than at the start, as TensorFlow's "same" does."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.margin = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, inputs):
        return functional.conv2d(self.margin(inputs), self.weight, self.bias, self.stride, 0, 1, self.groups)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 8, 3, padding=1, bias=False), (2, 6, 7, 5)),
        (nn.Conv2d(6, 12, (3, 2), stride=(2, 1), dilation=(1, 2), groups=3, bias=False), (2, 6, 9, 8)),
        (nn.Conv2d(4, 4, 5, padding="same", padding_mode="circular", groups=4, bias=False), (3, 4, 8, 8)),
        (nn.Conv1d(4, 6, 4, stride=3, padding=2, bias=False), (2, 4, 17)),
        (nn.Conv3d(2, 4, 2, bias=False), (2, 2, 4, 3, 5)),
        (PaddedConv(4, 8, 3, stride=2, groups=2, bias=False), (2, 4, 8, 8)),
    ],
)
def test_a_convolution_is_the_product_of_its_patches_and_its_weight(layer, shape):
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = layer(inputs)
        places = outputs[0, 0].numel()
        patches = sample_patches(layer, inputs, outputs.shape, 10**6, torch.Generator().manual_seed(1))
        groups, width = parts_and_width(layer)
        assert patches.shape == (len(inputs) * places, groups * width)
        by_group = patches.unflatten(1, (groups, width)).transpose(0, 1)
        weights = layer.weight.flatten(1).unflatten(0, (groups, -1))
        found = (by_group @ weights.transpose(1, 2)).transpose(0, 1).flatten(1)
    order = torch.randperm(places, generator=torch.Generator().manual_seed(1))
    expected = outputs.flatten(2)[:, :, order].transpose(1, 2).flatten(0, 1)
    assert (found - expected).abs().max() < 1e-5


def test_as_many_patches_as_wanted_are_taken():
    layer, inputs = nn.Conv2d(3, 4, 3), torch.randn(5, 3, 12, 12)
    assert len(sample_patches(layer, inputs, layer(inputs).shape, 42, torch.Generator())) == 45
    with pytest.raises(AssertionError):
        parts_and_width(nn.ReLU())


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_that_makes_up_for_errors_keeps_a_convolutional_network_nearer(bits):
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU6()),
        *(PaddedConv(24, 24, 3, stride=2, groups=24), nn.ReLU6(), nn.Conv2d(24, 32, 1), nn.ReLU6()),
        *(nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.ReLU6(), nn.Flatten(), nn.Linear(32 * 36, 10)),
    ).eval()
    # Neighbours are alike, as in images.
    batches = list(functional.interpolate(torch.rand(64, 3, 4, 4), 12, mode="bilinear").split(16))
    fold_batch_norm(network, batches[0])
    names = {name: bits for name, module in network.named_modules() if hasattr(module, "weight")}
    limit = 63 if bits == 8 else 2 ** (bits - 1) - 1
    nearest, compensated = copy.deepcopy(network), copy.deepcopy(network)
    for name in names:
        weight = nearest.get_submodule(name).weight.data
        weight.copy_(round_nearest(weight.flatten(1), channel_scales(weight, limit), limit).view_as(weight))
    calibration = calibrate_layers(compensated, names, batches)
    assert set(calibration) == set(names)
    for name, scales in calibration.items():
        weight = compensated.get_submodule(name).weight.detach()
        steps = torch.from_numpy(scales.weight).reshape(-1, *[1] * (weight.dim() - 1))
        integers = weight / steps
        assert (integers - integers.round()).abs().max() < 1e-3
        assert integers.abs().max() < limit + 0.5
        assert (scales.input is None) == (bits < 8)
    with torch.no_grad():
        exact, *found = (torch.cat([each(batch) for batch in batches]) for each in (network, nearest, compensated))
    assert (found[1] - exact).norm() < 0.5 * (found[0] - exact).norm()


def small_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10)]
    return nn.Sequential(*layers).eval()


def test_what_was_rounded_before_is_taken_without_a_look_at_the_data():
    batches, known = list(torch.randn(32, 3, 6, 6).split(16)), {}
    first = {"0": 8, "2": 4, "4": 4}
    calibrate_layers(small_network(), first, batches, known)
    assert set(known) == {(name, bits) for name in first for bits in (4, 8)}
    for bits in (first, {"0": 4, "2": 8, "4": 4}):
        taken, fresh = small_network(), small_network()
        found = calibrate_layers(taken, bits, [None], known)
        for name, scales in calibrate_layers(fresh, bits, batches).items():
            assert (found[name].bits, found[name].input) == (scales.bits, scales.input)
            assert (found[name].weight == scales.weight).all()
            assert torch.equal(taken.get_submodule(name).weight, fresh.get_submodule(name).weight)
    calibrate_layers(small_network(), {**first, "0": 3}, batches, known)
    assert {("0", 3), ("2", 3), ("0", 8)} <= set(known)


def test_nothing_is_kept_where_one_layers_bits_change_what_the_next_reads(monkeypatch):
    monkeypatch.setattr(observe, "_MEMORY", 1)
    known, bits = {}, {"0": 8, "2": 4, "4": 4}
    network, plain = small_network(), small_network()
    batches = list(torch.randn(32, 3, 6, 6).split(16))
    calibrate_layers(network, bits, batches, known)
    calibrate_layers(plain, bits, batches)
    assert not known
    assert torch.equal(network[4].weight, plain[4].weight)
