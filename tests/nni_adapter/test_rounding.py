from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nni.compression.base.apply_method import quant_apply_methods
from nni.compression.quantization import QATQuantizer
from torch import Tensor, nn

from ray_nascomp.nni_adapter import rounding
from ray_nascomp.nni_adapter.evaluator import make_evaluator, no_training
from ray_nascomp.nni_adapter.quantization import quantizer_entries
from ray_nascomp.nni_adapter.quantizers import Qat, follow_range, start_range
from ray_nascomp.nni_adapter.scales import ActivationScale, LayerScales

ACTIVATION = SimpleNamespace(scale=torch.tensor(0.03), zero_point=torch.tensor(101.0), qmin=0, qmax=255, _scaler=None)
ROWS = SimpleNamespace(
    scale=torch.tensor([0.01, 0.02, 0.03]).reshape(3, 1, 1), zero_point=torch.zeros(3, 1, 1), qmin=-63, qmax=63
)


def gradients(name: str, values: Tensor, space: SimpleNamespace, learned: tuple[str, ...] = ()) -> list[Tensor]:
    own = SimpleNamespace(**vars(space))
    own.shape = list(values.shape)
    leaves = [values.clone().requires_grad_()]
    for key in learned:
        setattr(own, key, getattr(space, key).clone().requires_grad_())
        leaves.append(getattr(own, key))
    result = quant_apply_methods[name](leaves[0], own)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), leaves)]


def values(*shape: int) -> Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_activations_are_rounded_as_torch_does():
    given = values(50, 40).requires_grad_()
    zero_point = ACTIVATION.zero_point.int()
    expected = torch.fake_quantize_per_tensor_affine(given, ACTIVATION.scale, zero_point, 0, 255)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    found, grad = gradients(rounding.QAT, given.detach(), ACTIVATION)
    assert 0 < (given.grad == 0).sum() < given.numel(), "some values lie beyond the range"
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert torch.equal(grad, given.grad)


def test_rows_are_rounded_as_torch_does():
    given = values(3, 20, 7).requires_grad_()
    zero_points = torch.zeros(3, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(given, ROWS.scale.flatten(), zero_points, 0, -63, 63)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    found, grad = gradients(rounding.QAT, given.detach(), ROWS)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert torch.equal(grad, given.grad)


@pytest.mark.parametrize(
    ("nnis", "learned"), [("lsq_clamp_round", ("scale",)), ("lsq_plus_clamp_round", ("scale", "zero_point"))]
)
def test_learned_scales_have_nnis_gradients(nnis, learned):
    zero_point = torch.tensor([101.3 if "zero_point" in learned else 0.0])
    space = SimpleNamespace(scale=torch.tensor([0.03]), zero_point=zero_point, qmin=-128, qmax=127, _scaler=None)
    given = values(50, 40)
    for expected, found in zip(
        gradients(nnis, given, space, learned), gradients(rounding.LEARNED, given, space, learned), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_ranges_follow_batches_as_nnis(digits_task):
    def spaces(quantizer_class):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
        entries = quantizer_entries({"0": 8, "3": 8}, (), "qat", {})
        evaluator = make_evaluator(network, digits_task, no_training, (torch.optim.SGD, {"lr": 0.0}))
        quantizer = quantizer_class(network, entries, evaluator)
        for layer, targets in quantizer._target_spaces.items():
            rows = len(network.get_submodule(layer).weight)
            scales = LayerScales(np.full(rows, 0.003, np.float32), ActivationScale(0.003, 128), None, 8)
            for target, space in targets.items():
                start_range(space, target, scales)
        network.train()
        for seed in range(3):
            network(values(8, 2, 6, 6) + seed)
        return [space for targets in quantizer._target_spaces.values() for space in targets.values()]

    for expected, found in zip(spaces(QATQuantizer), spaces(Qat), strict=True):
        for key in ("tracked_min", "tracked_max", "scale", "zero_point"):
            torch.testing.assert_close(getattr(found, key), getattr(expected, key), atol=1e-6, rtol=1e-5)


def test_a_range_moves_by_a_hundredth():
    space = SimpleNamespace(
        tracked_min=torch.tensor(-1.0), tracked_max=torch.tensor(1.0), qmin=0, qmax=255, scale=None, zero_point=None
    )
    follow_range(space, "_input_0", torch.tensor([-2.0, 3.0]))
    assert space.tracked_min.item() == pytest.approx(-1.01)
    assert space.tracked_max.item() == pytest.approx(1.02)
    assert space.scale.item() == pytest.approx(2.03 / 255)
