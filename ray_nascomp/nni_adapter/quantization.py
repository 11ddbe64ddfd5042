"""NNI's quantizers: simulated integers while training and evaluating, scales for the real ones.

Weights are symmetric, one scale an output channel; activations are affine, one scale a tensor.
8-bit weights keep to 7 bits of range (-63..63): products of unsigned activations and signed
weights then cannot saturate in the 16-bit accumulators of x86 processors without VNNI, so the
exported file gives the same result everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nni.compression.quantization import PtqQuantizer, QATQuantizer
from torch import nn

from ray_nascomp.nni_adapter.evaluator import TrainingFunction, TrainingStep, make_evaluator, no_training
from ray_nascomp.tasks.base import Task

WEIGHT_LIMIT = 63
"""Largest magnitude of an 8-bit weight whose products are computed in integers."""


@dataclass(frozen=True)
class ActivationScale:
    """Affine 8-bit quantization of a tensor: value = scale * (integer - zero_point), integer in 0..255."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class LayerScales:
    """What one layer's integers mean.

    Attributes:
        weight: Scales of the output channels, shape `(channels,)`; of an embedding one a row.
        input: The layer's input; None where only the weight is stored as integers and the layer
            computes in floating point.
        output: The layer's output, None where it is not quantized.
        bits: Bits of the weight, 1..8.
    """

    weight: np.ndarray
    input: ActivationScale | None
    output: ActivationScale | None
    bits: int = 8

    @property
    def limit(self) -> int:
        """Largest magnitude of the weight's integers.

        It is `2^(bits-1) - 1`, but for 8 bits with a quantized input `WEIGHT_LIMIT`, so that no
        product saturates, and for 1 bit 1, where the integers are -1 and +1 alone.
        """
        if self.bits == 8 and self.input is not None:
            return WEIGHT_LIMIT
        return max(1, 2 ** (self.bits - 1) - 1)

    def integers(self, weight: np.ndarray) -> np.ndarray:
        """The weight as int8, of its own shape; output channels come first."""
        scaled = weight / self.weight.reshape((-1,) + (1,) * (weight.ndim - 1))
        if self.bits == 1:
            return np.where(scaled >= 0, 1, -1).astype(np.int8)
        return np.clip(np.round(scaled), -self.limit, self.limit).astype(np.int8)


Calibration = dict[str, LayerScales]
"""Layer name -> its scales."""


class QuantizationSession:
    """A model under one of NNI's quantizers, from wrapping to unwrapping.

    Args:
        model: The model with batch normalisations folded; wrapped in place until `close`.
        task: Loss and calibration data.
        layers: Names of the layers to quantize.
        outputs: Names of those whose outputs are quantized as well.
        train: What an epoch of quantization-aware training does; None for post-training quantization.
        optimizer: Class and arguments of its optimizer.
        training_step: Function (batch, model) -> loss of that training.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        layers: Iterable[str],
        outputs: Collection[str],
        train: TrainingFunction | None = None,
        optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] = (torch.optim.SGD, {"lr": 0.0}),
        training_step: TrainingStep | None = None,
    ) -> None:
        self.model = model
        config = [_layer_config(name, name in outputs) for name in layers]
        evaluator = make_evaluator(model, task, train or no_training, optimizer, training_step)
        self._evaluator = evaluator
        if train is None:
            self._quantizer: Any = PtqQuantizer(model, config, evaluator)
            self._quantizer.compress(1, None)
        else:
            self._quantizer = QATQuantizer(model, config, evaluator)
            evaluator.bind_model(model, self._quantizer._get_param_names_map())
            self._quantizer._fuse_preprocess(evaluator)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of quantization-aware training."""
        return self._evaluator._optimizers[0]

    def train_epoch(self) -> None:
        """One call of the training function, with NNI's simulated integers in the forward pass."""
        self._evaluator.train(max_epochs=1)

    def calibration(self) -> Calibration:
        """The scales as they are now."""
        raw = self._quantizer.get_calibration_config()
        return {name: _layer_scales(targets) for name, targets in raw.items()}

    def close(self) -> None:
        """Unwraps the model; its weights are those that training has left."""
        if self._evaluator.model is not None:
            self._evaluator.unbind_model()
        self._quantizer.unwrap_model()


def _layer_config(name: str, with_output: bool) -> dict[str, Any]:
    activation = {"quant_dtype": "uint8", "quant_scheme": "affine", "granularity": "default"}
    targets: dict[str, Any] = {
        "_input_": activation,
        "weight": {"quant_dtype": "int7", "quant_scheme": "symmetric", "granularity": "out_channel"},
    }
    if with_output:
        targets["_output_"] = activation
    return {
        "op_names": [name],
        "quant_dtype": "int8",
        "target_names": list(targets),
        "target_settings": targets,
    }


def _layer_scales(targets: dict[str, dict[str, Any]]) -> LayerScales:
    return LayerScales(
        weight=targets["weight"]["scale"].detach().flatten().numpy().astype(np.float32),
        input=_activation(targets["_input_0"]),
        output=_activation(targets["_output_0"]) if "_output_0" in targets else None,
    )


def _activation(target: dict[str, Any]) -> ActivationScale:
    return ActivationScale(float(target["scale"]), int(target["zero_point"]))
