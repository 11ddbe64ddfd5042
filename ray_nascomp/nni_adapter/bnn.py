"""NNI's BNN for weights, mended for trained networks: rows keep their magnitude.

Signs: Courbariaux et al. 2016, arXiv 1602.02830; with one magnitude a row: Rastegari et al. 2016,
arXiv 1603.05279.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from nni.compression.base.apply_method import BNNClampRound, quant_apply_methods
from nni.compression.quantization import BNNQuantizer
from torch import Tensor

from ray_nascomp.nni_adapter.quantizers import Startable, like_rows, to_numpy
from ray_nascomp.nni_adapter.scales import Calibration


class Bnn(Startable, BNNQuantizer):
    """NNI's BNN for weights, each row with the mean magnitude that it had, in place of 1."""

    def register_bnn_apply_method(self) -> None:
        """See NNI."""
        for _, _, space in self.targets():
            space.apply_method = "bnn_rows"

    def start(self, calibration: Calibration, fresh: Collection[str]) -> None:
        """See `Startable`."""
        for layer, _, space in self.targets():
            weight = space.target.detach()
            magnitude = torch.from_numpy(calibration[layer].weight)
            if layer in fresh:
                magnitude = weight.flatten(1).abs().mean(dim=1)
            space._wrapper.register_buffer("row_magnitude", like_rows(magnitude, weight).to(weight.device))

    def weight_scale(self, space: Any) -> np.ndarray:
        """See `Startable`."""
        return to_numpy(space._wrapper.row_magnitude)


def _bnn_rows(target: Tensor, space: Any) -> Tensor:
    return BNNClampRound.apply(target, space) * space._wrapper.row_magnitude


# NNI looks its rounding functions up in this table, by the name that a target space has.
quant_apply_methods["bnn_rows"] = _bnn_rows
