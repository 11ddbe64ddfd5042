"""What every quantizer of ours does beyond NNI's, and the two that follow ranges: PTQ and QAT.

QAT: Jacob et al. 2018, arXiv 1712.05877.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from nni.compression.quantization import PtqQuantizer, QATQuantizer
from nni.compression.quantization.ptq_quantizer import compute_scale_zp
from torch import Tensor

from ray_nascomp.nni_adapter import rounding
from ray_nascomp.nni_adapter.scales import ActivationScale, Calibration, LayerScales

TINY = torch.finfo(torch.float32).eps
WEIGHT = "weight"
"""NNI's name of a weight among a layer's targets; the others are `INPUT` and "_output_0"."""
INPUT = "_input_0"
_STEP = 0.01
"""How far a range moves with a batch, as in NNI."""


class Startable:
    """What the session asks of a quantizer beyond NNI's own methods."""

    _target_spaces: dict[str, dict[str, Any]]

    def targets(self) -> Iterator[tuple[str, str, Any]]:
        """All (layer, target, NNI's space): the target is "weight", "_input_0" or "_output_0"."""
        for layer, spaces in self._target_spaces.items():
            for target, space in spaces.items():
                yield layer, target, space

    def start(self, calibration: Calibration, fresh: Collection[str]) -> None:
        """Takes over scales.

        Args:
            calibration: Scales of every layer.
            fresh: Names of the layers whose scales come from observation alone, not from an earlier session.
        """

    def set_activation(self, space: Any, scale: ActivationScale) -> None:
        """Sets the scale of an activation, as far as the quantizer can have it."""
        device = next(space._wrapper.parameters()).device
        space.scale = torch.tensor(scale.scale, device=device)
        space.zero_point = torch.tensor(float(scale.zero_point), device=device)

    def finish(self) -> None:
        """Leaves weights of which `LayerScales.integers` makes the integers that were simulated."""

    def weight_scale(self, space: Any) -> np.ndarray:
        """Scales of a weight's rows."""
        return to_numpy(space.scale)

    def activation_scale(self, space: Any) -> ActivationScale:
        """Scale of an activation."""
        return ActivationScale(space.scale.item(), int(space.zero_point.item()))


class Ptq(Startable, PtqQuantizer):
    """NNI's post-training quantizer."""

    def update_scale_zp(self) -> None:
        """Scales of what has been observed; NNI fails where a layer was never reached."""
        for _, _, space in self.targets():
            if space.tracked_max is not None:
                space.scale, space.zero_point = compute_scale_zp(space)

    def start(self, calibration: Calibration, fresh: Collection[str]) -> None:
        """See `Startable`; what has no scales keeps what was observed."""
        for layer, target, space in self.targets():
            if layer not in calibration:
                continue
            if target == WEIGHT:
                device = next(space._wrapper.parameters()).device
                space.scale = like_rows(torch.from_numpy(calibration[layer].weight), space.target).to(device)
                space.zero_point = torch.zeros_like(space.scale)
                continue
            activation = calibration[layer].input if target == INPUT else calibration[layer].output
            if activation is not None:
                self.set_activation(space, activation)


class Qat(Startable, QATQuantizer):
    """NNI's QAT. Its ranges start from calibration, not from the first training batch alone."""

    def register_qat_apply_method(self) -> None:
        """See NNI."""
        for _, _, space in self.targets():
            space.apply_method = rounding.QAT

    def track_min_max_val(self, wrapper: Any, target_name: str, target: Tensor) -> None:
        """Follows ranges, and sets their scales at once."""
        if wrapper.training and self.check_target(wrapper, target_name):
            follow_range(wrapper.quantization_target_spaces[target_name], target_name, target)

    def update_scale_zp(self, wrapper: Any, target_name: str, target: Tensor) -> None:
        """Nothing is left to do."""

    def start(self, calibration: Calibration, fresh: Collection[str]) -> None:
        """See `Startable`."""
        for layer, target, space in self.targets():
            start_range(space, target, calibration[layer])

    def set_activation(self, space: Any, scale: ActivationScale) -> None:
        """See `Startable`."""
        set_range(space, scale)


def activation_of(scales: LayerScales, target: str) -> ActivationScale:
    """A layer's scale for NNI's target "_input_0" or "_output_0"."""
    found = scales.input if target == INPUT else scales.output
    assert found is not None
    return found


def like_rows(values: Tensor, weight: Tensor) -> Tensor:
    """One value a row, of a shape that spreads over the weight."""
    return values.clamp(min=TINY).reshape(-1, *[1] * (weight.dim() - 1))


def start_range(space: Any, target: str, scales: Any) -> None:
    """Sets the range that a QAT quantizer goes on to follow."""
    if target == WEIGHT:
        reach = like_rows(torch.from_numpy(scales.weight), space.target).to(space.target.device) * space.qmax
        space.tracked_min, space.tracked_max = -reach, reach
        space.scale, space.zero_point = reach / space.qmax, torch.zeros_like(reach)
        return
    set_range(space, activation_of(scales, target))


def set_range(space: Any, activation: ActivationScale) -> None:
    """Sets the range of an activation that a QAT quantizer goes on to follow."""
    device = next(space._wrapper.parameters()).device
    space.tracked_min = torch.tensor(-activation.zero_point * activation.scale, device=device)
    space.tracked_max = torch.tensor((space.qmax - activation.zero_point) * activation.scale, device=device)
    set_affine(space)


def follow_range(space: Any, target: str, values: Tensor) -> None:
    """Moves the range of a weight's rows or of an activation towards that of the values, and sets its scale."""
    values = values.detach()
    low, high = values.flatten(1).aminmax(dim=1) if target == WEIGHT else values.aminmax()
    for tracked, found in ((space.tracked_min, low), (space.tracked_max, high)):
        tracked.lerp_(found.to(tracked.dtype).reshape(tracked.shape), _STEP)
    if target == WEIGHT:
        space.scale = (torch.maximum(-space.tracked_min, space.tracked_max) / space.qmax).clamp(min=TINY)
    else:
        set_affine(space)


def set_affine(space: Any) -> None:
    """Sets the scale and zero point of the range that an activation has been tracked in."""
    low, high = space.tracked_min.clamp(max=0.0), space.tracked_max.clamp(min=0.0)
    scale = ((high - low) / (space.qmax - space.qmin)).clamp(min=TINY)
    space.scale = scale
    space.zero_point = (space.qmin - (low / scale).round()).clamp(space.qmin, space.qmax)


def to_numpy(scale: Tensor) -> np.ndarray:
    """Scales of rows, shape `(rows,)`."""
    return scale.detach().flatten().cpu().numpy().astype(np.float32)
