"""NNI's quantizers, mended: they start from what was observed and end in scales that files can hold.

All of them round weights symmetrically. Activations are affine in 8 bits.

- Qat: ranges followed while training (Jacob et al. 2018, arXiv 1712.05877).
- Lsq: learned scales (Esser et al. 2020, arXiv 1902.08153).
- LsqPlus: learned zero points of activations as well (Bhalgat et al. 2020, arXiv 2004.09576).
- DoReFa: weights squeezed by tanh (Zhou et al. 2016, arXiv 1606.06160).
- Bnn: signs (Courbariaux et al. 2016, arXiv 1602.02830), with one magnitude a row (Rastegari et
  al. 2016, arXiv 1603.05279).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nni.compression.base.apply_method import BNNClampRound, DoferaGradClampRound, quant_apply_methods
from nni.compression.quantization import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)
from nni.compression.quantization.qat_quantizer import track_min_max_val
from torch import Tensor, nn

from ray_nascomp.nni_adapter.scales import ActivationScale, Calibration

_TINY = torch.finfo(torch.float32).eps
WEIGHT = "weight"
SIGNED_ZERO = 128
"""Where zero lies in 0..255 for integers from -128 to 127."""


class Startable:
    """What the session asks of a quantizer beyond NNI's own methods."""

    _target_spaces: dict[str, dict[str, Any]]

    def targets(self) -> Iterator[tuple[str, str, Any]]:
        """All (layer, target, NNI's space): the target is "weight", "_input_0" or "_output_0"."""
        for layer, spaces in self._target_spaces.items():
            for target, space in spaces.items():
                yield layer, target, space

    def start(self, calibration: Calibration, is_fresh: bool) -> None:
        """Takes over scales.

        Args:
            calibration: Scales of every layer.
            is_fresh: Whether they come from observation alone, not from an earlier session.
        """

    def finish(self) -> None:
        """Leaves weights of which `LayerScales.integers` makes the integers that were simulated."""

    def weight_scale(self, space: Any) -> np.ndarray:
        """Scales of a weight's rows."""
        return _to_numpy(space.scale)

    def activation_scale(self, space: Any) -> ActivationScale:
        """Scale of an activation."""
        return ActivationScale(space.scale.item(), int(space.zero_point.item()))


class Ptq(Startable, PtqQuantizer):
    """NNI's post-training quantizer."""


class Qat(Startable, QATQuantizer):
    """NNI's QAT. Its ranges start from calibration, not from the first training batch alone."""

    def start(self, calibration: Calibration, is_fresh: bool) -> None:
        """See `Startable`."""
        for layer, target, space in self.targets():
            _start_range(space, target, calibration[layer])


class Lsq(Startable, LsqQuantizer):
    """NNI's LSQ. Its scales start at a value that fits, not at 0.01."""

    def start(self, calibration: Calibration, is_fresh: bool) -> None:
        """See `Startable`. Weights start at 2 mean |w| / sqrt(largest integer), as published."""
        self.is_init = True
        for layer, target, space in self.targets():
            if target == WEIGHT:
                scale = torch.from_numpy(calibration[layer].weight)
                if is_fresh:
                    scale = self.first_weight_scale(space.target.detach().flatten(1), space.qmax)
                _set_scale(space, _like_rows(scale, space.target), 0.0)
            else:
                self.start_activation(space, _activation_of(calibration[layer], target))

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

    def learned(self) -> Iterator[tuple[nn.Parameter, float | None]]:
        """Learned parameters with the size of a whole step of theirs; None for their own size."""
        for _, _, space in self.targets():
            yield space.scale, None

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

    def start(self, calibration: Calibration, is_fresh: bool) -> None:
        """See `Startable`. Weights start at three deviations around the mean, as published."""
        self.is_init = True
        for layer, target, space in self.targets():
            if target == WEIGHT:
                scale = torch.from_numpy(calibration[layer].weight)
                if is_fresh:
                    rows = space.target.detach().flatten(1)
                    mean, reach = rows.mean(dim=1), 3 * rows.std(dim=1, correction=0)
                    scale = torch.maximum((mean - reach).abs(), (mean + reach).abs()) / (space.qmax + 1)
                _set_scale(space, _like_rows(scale, space.target), 0.0)
                space.zero_point.requires_grad_(False)
            else:
                observed = _activation_of(calibration[layer], target)
                _set_scale(space, torch.tensor([observed.scale]), float(observed.zero_point))

    def learned(self) -> Iterator[tuple[nn.Parameter, float | None]]:
        """See `Lsq.learned`."""
        for _, target, space in self.targets():
            yield space.scale, None
            if target != WEIGHT:
                yield space.zero_point, float(space.qmax - space.qmin)

    def round_zero_points(self) -> None:
        """Zero points become integers, which is all that files have."""
        for _, target, space in self.targets():
            if target != WEIGHT:
                space.zero_point.data.round_().clamp_(space.qmin, space.qmax)


class DoReFa(Startable, DoReFaQuantizer):
    """NNI's DoReFa, for trained networks.

    The published weights lie in [-1, 1] whatever their size was, which only a network with batch
    normalisation bears, trained from nothing. Here each row keeps its magnitude, the latent weights
    start where the squeezed ones are the trained ones, and inputs have the ranges of QAT: NNI's
    follow each batch, in evaluation too. NNI also rounds gradients: a sample without gradient
    divides 0 by 0 there, and artifacts have nothing of it, so they are left as they are.
    """

    def check_validation(self) -> None:
        """Outputs are quantized like inputs, so that NNI's refusal of layers without activation is not needed."""

    def register_output_backward_hook(self) -> None:
        """Gradients are not rounded."""

    def register_dorefa_apply_method(self) -> None:
        """See NNI."""
        for _, target, space in self.targets():
            space.apply_method = "dorefa_rows" if target == WEIGHT else "qat_clamp_round"

    def initialize_scale_zp(self, wrapper: Any, target_name: str, target: Tensor) -> None:
        """See NNI; here for weights alone."""
        if target_name == WEIGHT:
            super().initialize_scale_zp(wrapper, target_name, target)

    def update_scale_zp(self, wrapper: Any, target_name: str, target: Tensor) -> None:
        """Ranges of activations are followed while training, as QAT does."""
        if target_name != WEIGHT and wrapper.training and self.check_target(wrapper, target_name):
            track_min_max_val(wrapper, target_name, target)
            _set_affine(wrapper.quantization_target_spaces[target_name])

    def start(self, calibration: Calibration, is_fresh: bool) -> None:
        """See `Startable`."""
        for layer, target, space in self.targets():
            if target != WEIGHT:
                _start_range(space, target, calibration[layer])
                continue
            weight = space.target.data
            magnitude = _like_rows(torch.from_numpy(calibration[layer].weight), weight) * space.qmax
            space._wrapper.register_buffer("row_magnitude", magnitude.to(weight.device))
            largest = weight.abs().max().clamp(_TINY, 2.0).tanh()
            weight.copy_((largest * (weight / space._wrapper.row_magnitude).clamp(-1, 1)).atanh())

    def finish(self) -> None:
        """See `Startable`."""
        for _, target, space in self.targets():
            if target == WEIGHT:
                squeezed = space.target.data.tanh()
                space.target.data.copy_(space._wrapper.row_magnitude * squeezed / squeezed.abs().max())

    def weight_scale(self, space: Any) -> np.ndarray:
        """See `Startable`."""
        return _to_numpy(space._wrapper.row_magnitude / space.qmax)


class Bnn(Startable, BNNQuantizer):
    """NNI's BNN for weights, each row with the mean magnitude that it had, in place of 1."""

    def register_bnn_apply_method(self) -> None:
        """See NNI."""
        for _, _, space in self.targets():
            space.apply_method = "bnn_rows"

    def start(self, calibration: Calibration, is_fresh: bool) -> None:
        """See `Startable`."""
        for layer, _, space in self.targets():
            weight = space.target.detach()
            magnitude = torch.from_numpy(calibration[layer].weight)
            if is_fresh:
                magnitude = weight.flatten(1).abs().mean(dim=1)
            space._wrapper.register_buffer("row_magnitude", _like_rows(magnitude, weight).to(weight.device))

    def weight_scale(self, space: Any) -> np.ndarray:
        """See `Startable`."""
        return _to_numpy(space._wrapper.row_magnitude)


def _dorefa_rows(target: Tensor, space: Any) -> Tensor:
    return DoferaGradClampRound.dorefa_clamp_round_weight(target, space) * space._wrapper.row_magnitude


def _bnn_rows(target: Tensor, space: Any) -> Tensor:
    return BNNClampRound.apply(target, space) * space._wrapper.row_magnitude


# NNI looks its rounding functions up in this table, by the name that a target space has.
quant_apply_methods.update(dorefa_rows=_dorefa_rows, bnn_rows=_bnn_rows)


def _activation_of(scales: Any, target: str) -> ActivationScale:
    return scales.input if target == "_input_0" else scales.output


def _like_rows(values: Tensor, weight: Tensor) -> Tensor:
    """One value a row, of a shape that spreads over the weight."""
    return values.clamp(min=_TINY).reshape(-1, *[1] * (weight.dim() - 1))


def _set_scale(space: Any, scale: Tensor, zero_point: float) -> None:
    """Sets learned scales; the parameter that the optimizer holds stays the same."""
    device = space.scale.device
    space.scale.data = scale.to(device)
    zeros = torch.full_like(space.scale.data, zero_point)
    if isinstance(space.zero_point, nn.Parameter):
        space.zero_point.data = zeros
    else:
        space.zero_point = zeros


def _start_range(space: Any, target: str, scales: Any) -> None:
    """Sets the range that a QAT quantizer goes on to follow."""
    if target == WEIGHT:
        reach = _like_rows(torch.from_numpy(scales.weight), space.target).to(space.target.device) * space.qmax
        space.tracked_min, space.tracked_max = -reach, reach
        space.scale, space.zero_point = reach / space.qmax, torch.zeros_like(reach)
        return
    activation = _activation_of(scales, target)
    device = next(space._wrapper.parameters()).device
    space.tracked_min = torch.tensor(-activation.zero_point * activation.scale, device=device)
    space.tracked_max = torch.tensor((space.qmax - activation.zero_point) * activation.scale, device=device)
    _set_affine(space)


def _set_affine(space: Any) -> None:
    low, high = space.tracked_min.clamp(max=0.0), space.tracked_max.clamp(min=0.0)
    scale = ((high - low) / (space.qmax - space.qmin)).clamp(min=_TINY)
    space.scale = scale
    space.zero_point = (space.qmin - (low / scale).round()).clamp(space.qmin, space.qmax)


def _to_numpy(scale: Tensor) -> np.ndarray:
    return scale.detach().flatten().cpu().numpy().astype(np.float32)
