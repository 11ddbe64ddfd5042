"""NNI's DoReFa, mended for trained networks: rows keep their magnitude.

Weights squeezed by tanh: Zhou et al. 2016, arXiv 1606.06160.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from nni.compression.base.apply_method import DoferaGradClampRound, quant_apply_methods
from nni.compression.quantization import DoReFaQuantizer
from torch import Tensor

from ray_nascomp.nni_adapter import rounding
from ray_nascomp.nni_adapter.quantizers import (
    TINY,
    WEIGHT,
    Startable,
    follow_range,
    like_rows,
    set_range,
    start_range,
    to_numpy,
)
from ray_nascomp.nni_adapter.scales import ActivationScale, Calibration


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
            space.apply_method = "dorefa_rows" if target == WEIGHT else rounding.QAT

    def initialize_scale_zp(self, wrapper: Any, target_name: str, target: Tensor) -> None:
        """See NNI; here for weights alone."""
        if target_name == WEIGHT:
            super().initialize_scale_zp(wrapper, target_name, target)

    def update_scale_zp(self, wrapper: Any, target_name: str, target: Tensor) -> None:
        """Ranges of activations are followed while training, as QAT does."""
        if target_name != WEIGHT and wrapper.training and self.check_target(wrapper, target_name):
            follow_range(wrapper.quantization_target_spaces[target_name], target_name, target)

    def start(self, calibration: Calibration, fresh: Collection[str]) -> None:
        """See `Startable`."""
        for layer, target, space in self.targets():
            if target != WEIGHT:
                start_range(space, target, calibration[layer])
                continue
            weight = space.target.data
            magnitude = like_rows(torch.from_numpy(calibration[layer].weight), weight) * space.qmax
            space._wrapper.register_buffer("row_magnitude", magnitude.to(weight.device))
            largest = weight.abs().max().clamp(TINY, 2.0).tanh()
            weight.copy_((largest * (weight / space._wrapper.row_magnitude).clamp(-1, 1)).atanh())

    def set_activation(self, space: Any, scale: ActivationScale) -> None:
        """See `Startable`."""
        set_range(space, scale)

    def finish(self) -> None:
        """See `Startable`."""
        for _, target, space in self.targets():
            if target == WEIGHT:
                squeezed = space.target.data.tanh()
                space.target.data.copy_(space._wrapper.row_magnitude * squeezed / squeezed.abs().max())

    def weight_scale(self, space: Any) -> np.ndarray:
        """See `Startable`."""
        return to_numpy(space._wrapper.row_magnitude / space.qmax)


def _dorefa_rows(target: Tensor, space: Any) -> Tensor:
    return DoferaGradClampRound.dorefa_clamp_round_weight(target, space) * space._wrapper.row_magnitude


# NNI looks its rounding functions up in this table, by the name that a target space has.
quant_apply_methods["dorefa_rows"] = _dorefa_rows
