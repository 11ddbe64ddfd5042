from __future__ import annotations

from collections.abc import Callable
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


def gradients(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """What a function makes of its arguments, and the gradients of these."""
    own = [leaf.clone().requires_grad_() for leaf in leaves]
    result = function(*own)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), own)]


def by_name(name: str, space: SimpleNamespace, learned: tuple[str, ...] = ()) -> Callable[..., Tensor]:
    """A function of NNI's table, of the values and of what is learned."""

    def apply(values: Tensor, *tensors: Tensor) -> Tensor:
        parts = {**vars(space), **dict(zip(learned, tensors, strict=True)), "shape": list(values.shape)}
        return quant_apply_methods[name](values, SimpleNamespace(**parts))

    return apply


def values(*shape: int) -> Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("space", "shape", "torchs"),
    [
        (
            ACTIVATION,
            (50, 40),
            lambda given: torch.fake_quantize_per_tensor_affine(
                given, ACTIVATION.scale, ACTIVATION.zero_point.int(), 0, 255
            ),
        ),
        (
            ROWS,
            (3, 20, 7),
            lambda given: torch.fake_quantize_per_channel_affine(
                given, ROWS.scale.flatten(), ROWS.zero_point.flatten().int(), 0, -63, 63
            ),
        ),
    ],
    ids=["activations", "rows"],
)
def test_values_are_rounded_as_torch_does(space, shape, torchs):
    expected, expected_grad = gradients(torchs, values(*shape))
    found, grad = gradients(by_name(rounding.QAT, space), values(*shape))
    assert 0 < (expected_grad == 0).sum() < grad.numel(), "some values lie beyond the range"
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize(
    ("nnis", "learned"), [("lsq_clamp_round", ("scale",)), ("lsq_plus_clamp_round", ("scale", "zero_point"))]
)
def test_learned_scales_have_nnis_gradients(nnis, learned):
    zero_point = torch.tensor([101.3 if "zero_point" in learned else 0.0])
    space = SimpleNamespace(scale=torch.tensor([0.03]), zero_point=zero_point, qmin=-128, qmax=127, _scaler=None)
    leaves = [values(50, 40), *(getattr(space, key) for key in learned)]
    both = (gradients(by_name(name, space, learned), *leaves) for name in (nnis, rounding.LEARNED))
    for expected, found in zip(*both, strict=True):
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
