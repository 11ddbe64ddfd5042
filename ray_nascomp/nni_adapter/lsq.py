"""NNI's quantizers that learn their scales, mended: they start where they fit and take steps of their own size.

LSQ: Esser et al. 2020, arXiv 1902.08153. LSQ+: Bhalgat et al. 2020, arXiv 2004.09576.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from nni.compression import TorchEvaluator
from nni.compression.quantization import LsqPlusQuantizer, LsqQuantizer
from torch import Tensor, nn

from ray_nascomp.nni_adapter import rounding
from ray_nascomp.nni_adapter.quantizers import WEIGHT, Startable, activation_of, like_rows
from ray_nascomp.nni_adapter.scales import ActivationScale, Calibration

SIGNED_ZERO = 128
"""Where zero lies in 0..255 for integers from -128 to 127."""


class Lsq(Startable, LsqQuantizer):
    """NNI's LSQ. Its scales start at a value that fits, not at 0.01."""

    def register_lsq_apply_method(self) -> None:
        """See NNI."""
        for _, _, space in self.targets():
            space.apply_method = rounding.LEARNED

    def start(self, calibration: Calibration, fresh: Collection[str]) -> None:
        """See `Startable`. Weights start at 2 mean |w| / sqrt(largest integer), as published."""
        self.is_init = True
        for layer, target, space in self.targets():
            if target == WEIGHT:
                scale = torch.from_numpy(calibration[layer].weight)
                if layer in fresh:
                    scale = self.first_weight_scale(space.target.detach().flatten(1), space.qmax)
                _set_scale(space, like_rows(scale, space.target), 0.0)
            else:
                self.start_activation(space, activation_of(calibration[layer], target))

    def first_weight_scale(self, rows: Tensor, qmax: int) -> Tensor:
        """Scales of the rows of a weight, shape `(rows,)`."""
        return 2 * rows.abs().mean(dim=1) / qmax**0.5

    def start_activation(self, space: Any, observed: ActivationScale) -> None:
        """Sets an activation's first scale; without a zero point that is not 0, negative values need a sign."""
        if space.quant_dtype == "uint8":
            _set_scale(space, torch.tensor([observed.scale]), 0.0)
            return
        # NNI's int8 ends at -127; files have -128 too.
        setattr(space._wrapper, space._qmin_name, -SIGNED_ZERO)
        reach = max(observed.zero_point, 255 - observed.zero_point)
        _set_scale(space, torch.tensor([observed.scale * reach / (SIGNED_ZERO - 1)]), 0.0)

    def set_activation(self, space: Any, scale: ActivationScale) -> None:
        """See `Startable`; zero points stay."""
        _set_scale(space, torch.tensor([scale.scale]), 0.0)

    def _fuse_preprocess(self, evaluator: TorchEvaluator) -> None:
        super()._fuse_preprocess(evaluator)
        _take_relative_steps(evaluator, [(space.scale, None) for _, _, space in self.targets()])

    def activation_scale(self, space: Any) -> ActivationScale:
        """See `Startable`."""
        return ActivationScale(space.scale.item(), 0 if space.quant_dtype == "uint8" else SIGNED_ZERO)


class LsqPlus(Startable, LsqPlusQuantizer):
    """NNI's LSQ+. Scales and zero points start at values that fit, and zero points end as integers.

    NNI starts every scale at 0.01 and every zero point at half of the range. For signed integers
    that is the largest one, so that all positive values become 0 and give the scale no gradient:
    that is why scales do not move. Weights have no zero point, as in the paper: files would need an
    asymmetric kernel for it.
    """

    def register_lsq_plus_apply_method(self) -> None:
        """See NNI."""
        for _, _, space in self.targets():
            space.apply_method = rounding.LEARNED

    def start(self, calibration: Calibration, fresh: Collection[str]) -> None:
        """See `Startable`. Weights start at three deviations around the mean, as published."""
        self.is_init = True
        for layer, target, space in self.targets():
            if target == WEIGHT:
                scale = torch.from_numpy(calibration[layer].weight)
                if layer in fresh:
                    rows = space.target.detach().flatten(1)
                    mean, reach = rows.mean(dim=1), 3 * rows.std(dim=1, correction=0)
                    scale = torch.maximum((mean - reach).abs(), (mean + reach).abs()) / (space.qmax + 1)
                _set_scale(space, like_rows(scale, space.target), 0.0)
                space.zero_point.requires_grad_(False)
            else:
                self.set_activation(space, activation_of(calibration[layer], target))

    def set_activation(self, space: Any, scale: ActivationScale) -> None:
        """See `Startable`."""
        _set_scale(space, torch.tensor([scale.scale]), float(scale.zero_point))

    def _fuse_preprocess(self, evaluator: TorchEvaluator) -> None:
        super()._fuse_preprocess(evaluator)
        activations = [space for _, target, space in self.targets() if target != WEIGHT]
        zero_points = [(space.zero_point, float(space.qmax - space.qmin)) for space in activations]
        _take_relative_steps(evaluator, [*((space.scale, None) for _, _, space in self.targets()), *zero_points])

    def _fuse_postprocess(self, evaluator: TorchEvaluator) -> None:
        """Zero points become integers, which is all that files have."""
        super()._fuse_postprocess(evaluator)
        for _, target, space in self.targets():
            if target != WEIGHT:
                space.zero_point.data.round_().clamp_(space.qmin, space.qmax)


def _set_scale(space: Any, scale: Tensor, zero_point: float) -> None:
    """Sets learned scales; the parameter that the optimizer holds stays the same."""
    device = space.scale.device
    space.scale.data = scale.to(device)
    zeros = torch.full_like(space.scale.data, zero_point)
    if isinstance(space.zero_point, nn.Parameter):
        space.zero_point.data = zeros
    else:
        space.zero_point = zeros


def _take_relative_steps(evaluator: TorchEvaluator, learned: Sequence[tuple[nn.Parameter, float | None]]) -> None:
    """Lets learned scales move by shares of their size.

    NNI gives them the learning rate of the weights, and an adaptive optimizer takes a whole step of
    it whatever the gradient is: at 0.001 a tenth of a scale of 0.01.

    Args:
        evaluator: NNI's evaluator, bound to the model.
        learned: Parameters with the size that steps are shares of; None for their own.
    """
    before: list[Tensor] = []

    def remember() -> None:
        before[:] = [parameter.detach().clone() for parameter, _ in learned]

    def shorten() -> None:
        with torch.no_grad():
            for (parameter, size), old in zip(learned, before, strict=True):
                parameter.copy_(old + (parameter - old) * (old.abs() if size is None else size))

    evaluator.patch_optimizer_step(before_step_tasks=[remember], after_step_tasks=[shorten])
