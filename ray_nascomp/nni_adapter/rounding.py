"""NNI's simulated integers in fewer passes over a tensor: what training with integers spends most of its time on.

Ties between two integers go where the exported file's go, and QAT's gradients are those of torch's fake quantization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nni.compression.base.apply_method import quant_apply_methods
from torch import Tensor

QAT, LEARNED = "qat_in_few_passes", "learned_in_few_passes"
"""Names of the functions in NNI's table; a target space has one of its names as `apply_method`."""

_grad_within = torch.ops.aten.hardtanh_backward


class _Affine(torch.autograd.Function):
    """Integers with a zero point; values that round into their range have the gradient of what becomes of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        integers = (values / scale).round_().add_(zero_point)
        ctx.save_for_backward(integers)
        ctx.low, ctx.high = low, high
        return integers.clamp(low, high).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (integers,) = ctx.saved_tensors
        return _grad_within(grad, integers, ctx.low - 0.5, ctx.high + 0.5), None, None, None, None


class _Learned(torch.autograd.Function):
    """Integers whose scale (LSQ) and zero point (LSQ+) have gradients too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        shares = (values / scale).add_(zero_point)
        steps = shares.clamp(low, high).round_().sub_(zero_point)
        ctx.save_for_backward(shares, steps, scale, zero_point)
        ctx.low, ctx.high = low, high
        return steps * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shares, steps, scale, zero_point = ctx.saved_tensors
        within = _grad_within(grad, shares, ctx.low, ctx.high)
        of_scale = (grad * steps).addcmul_(within, shares - zero_point, value=-1).sum_to_size(scale.shape)
        of_scale.mul_((ctx.high * grad.numel()) ** -0.5)
        of_zero_point = None
        if ctx.needs_input_grad[2]:
            of_zero_point = (within - grad).mul_(scale).sum_to_size(zero_point.shape)
        return within, of_scale, of_zero_point, None, None


def _applied(function: type[torch.autograd.Function]) -> Callable[[Tensor, Any], Tensor]:
    def apply(values: Tensor, space: Any) -> Tensor:
        found: Tensor = function.apply(values, space.scale, space.zero_point, space.qmin, space.qmax)
        return found

    return apply


quant_apply_methods[QAT] = _applied(_Affine)
quant_apply_methods[LEARNED] = _applied(_Learned)
