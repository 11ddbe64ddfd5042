"""NNI's quantizers: simulated integers while training and evaluating, scales for the real ones.

Weights are symmetric, one scale an output channel; activations are affine, one scale a tensor.
8-bit weights keep to 7 bits of range (-63..63): products of unsigned activations and signed
weights then cannot saturate in the 16-bit accumulators of x86 processors without VNNI, so the
exported file gives the same result everywhere. With fewer than 8 bits weights alone are
quantized: a file computes with them in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ray_nascomp.nni_adapter.bnn import Bnn
from ray_nascomp.nni_adapter.dorefa import DoReFa
from ray_nascomp.nni_adapter.embeddings import RoundedEmbeddings
from ray_nascomp.nni_adapter.evaluator import (
    TrainingFunction,
    TrainingStep,
    make_evaluator,
    no_training,
    register_subclasses,
)
from ray_nascomp.nni_adapter.lsq import Lsq, LsqPlus
from ray_nascomp.nni_adapter.mends import mend_copied_settings, unwrap
from ray_nascomp.nni_adapter.output_forms import OutputForm, fitted
from ray_nascomp.nni_adapter.quantizers import INPUT, WEIGHT, Ptq, Qat
from ray_nascomp.nni_adapter.scales import WEIGHT_LIMIT, ActivationScale, Calibration, LayerScales
from ray_nascomp.tasks.base import Task

__all__ = ["WEIGHT_LIMIT", "ActivationScale", "Calibration", "LayerScales", "QuantizationSession"]

WeightScale = Callable[[np.ndarray, int], np.ndarray]
"""(weight, largest integer) -> scales of its output channels."""

_OUTPUT = "_output_0"

mend_copied_settings()


class QuantizationSession:
    """A model under one of NNI's quantizers, from wrapping to unwrapping.

    Args:
        model: The model with batch normalisations folded; wrapped in place until `close`.
        task: Loss and calibration data.
        bits: Names of layers and embeddings -> bits of their weight, as `QUANTIZER_BITS` offers
            them for the method. The inputs of layers with 8 bits are quantized too.
        outputs: Names of the layers with 8 bits whose outputs are quantized as well -> what their scales must fit.
        train: What an epoch of quantization-aware training does; None for "ptq".
        optimizer: Class and arguments of its optimizer.
        training_step: Function (batch, model) -> loss of that training.
        method: "ptq", or one that trains.
        start: Scales of an earlier session, from which training goes on; what they lack is observed. For
            "ptq", scales that were found otherwise, in place of those observed.
        weight_scale: For "ptq", where scales of weights come from in place of their largest values.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        bits: Mapping[str, int],
        outputs: Mapping[str, OutputForm],
        train: TrainingFunction | None = None,
        optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] = (torch.optim.SGD, {"lr": 0.0}),
        training_step: TrainingStep | None = None,
        method: str = "ptq",
        start: Calibration | None = None,
        weight_scale: WeightScale | None = None,
    ) -> None:
        self.model = model
        self._bits, self._outputs = dict(bits), dict(outputs)
        rows = {name: value for name, value in bits.items() if isinstance(model.get_submodule(name), nn.Embedding)}
        layers = {name: value for name, value in bits.items() if name not in rows}
        register_subclasses(model, layers)
        known = {name: scales for name, scales in (start or {}).items() if name in layers}
        fresh = layers.keys() - known.keys()
        if method != "ptq" and (fresh or any(name in known and known[name].output is None for name in outputs)):
            observing = QuantizationSession(model, task, bits, outputs)
            for name, scales in observing.calibration().items():
                known[name] = replace(known[name], output=scales.output) if name in known else scales
            observing.close()
        for name, form in outputs.items():
            if name in known and (scale := known[name].output) is not None:
                known[name] = replace(known[name], output=fitted(scale, form))
        self._embeddings = RoundedEmbeddings(model, rows)
        config = quantizer_entries(layers, outputs, method, known)
        # Ranges of weights show on any batch: no data is needed where all inputs' are known.
        unseen = any(layers[name] == 8 for name in fresh) or any(
            known[name].output is None for name in known.keys() & outputs
        )
        is_observing = method == "ptq" and unseen
        examples = None if is_observing else [task.example_inputs]
        self._evaluator = make_evaluator(model, task, train or no_training, optimizer, training_step, examples)
        self._quantizer: Any = QUANTIZERS[method](model, config, self._evaluator)
        if method == "ptq":
            self._quantizer.compress(1, None)
            if weight_scale is not None:
                self._set_weight_scales(weight_scale)
            self._quantizer.start(known, fresh)
        else:
            self._evaluator.bind_model(model, self._quantizer._get_param_names_map())
            self._quantizer._fuse_preprocess(self._evaluator)
            self._quantizer.start(known, fresh)
        self._fit_outputs()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of quantization-aware training."""
        return self._evaluator._optimizers[0]

    def train_epoch(self) -> None:
        """One call of the training function, with NNI's simulated integers in the forward pass."""
        self._evaluator.train(max_epochs=1)
        self._quantizer._fuse_postprocess(self._evaluator)
        self._fit_outputs()

    def calibration(self) -> Calibration:
        """The scales as they are now."""
        rows = self._embeddings.scales()
        found = {name: LayerScales(scale, None, None, self._bits[name]) for name, scale in rows.items()}
        found |= read_calibration(self._quantizer, self._bits)
        return {name: found[name] for name in self._bits}

    def close(self) -> None:
        """Unwraps the model; its weights are those that training has left.

        They are not rounded: `LayerScales.integers` gives the integers that were simulated.
        """
        self._quantizer.finish()
        if self._evaluator.model is not None:
            self._evaluator.unbind_model()
        unwrap(self._quantizer)
        self._embeddings.close()

    def _fit_outputs(self) -> None:
        for layer, target, space in self._quantizer.targets():
            if target == _OUTPUT:
                scale = self._quantizer.activation_scale(space)
                fitting = fitted(scale, self._outputs[layer])
                if fitting != scale:
                    self._quantizer.set_activation(space, fitting)

    def _set_weight_scales(self, weight_scale: WeightScale) -> None:
        for _, target, space in self._quantizer.targets():
            if target == WEIGHT:
                weight = space.target.detach()
                scale = torch.from_numpy(np.asarray(weight_scale(weight.cpu().numpy(), space.qmax), np.float32))
                space.scale = scale.reshape(space.scale.shape).to(weight.device)


def quantizer_entries(
    layers: Mapping[str, int], outputs: Collection[str], method: str, observed: Calibration
) -> list[dict[str, Any]]:
    """NNI's config, one entry a layer: their order, unlike that of names in one entry, is fixed.

    Args:
        layers: Layer name -> bits.
        outputs: Names of the layers whose outputs are quantized as well.
        method: A quantizer.
        observed: Scales of activations, where there are any yet.
    """
    return [_layer_config(name, bits, name in outputs, method, observed) for name, bits in layers.items()]


def read_calibration(quantizer: Any, bits: Mapping[str, int]) -> Calibration:
    """The scales that a quantizer has now, of all its layers."""
    found = {}
    for name, targets in quantizer._target_spaces.items():
        activations = {
            target: quantizer.activation_scale(space) for target, space in targets.items() if target != WEIGHT
        }
        found[name] = LayerScales(
            weight=quantizer.weight_scale(targets[WEIGHT]),
            input=activations.get(INPUT),
            output=activations.get(_OUTPUT),
            bits=bits[name],
        )
    return found


def _layer_config(name: str, bits: int, with_output: bool, method: str, observed: Calibration) -> dict[str, Any]:
    dtype = "int7" if bits == 8 else f"int{max(bits, 2)}"
    # DoReFa and BNN squeeze a weight as a whole and refuse rows; ours has a magnitude for each.
    granularity = "default" if method in ("dorefa", "bnn") else "out_channel"
    targets: dict[str, Any] = {
        WEIGHT: {"quant_dtype": dtype, "quant_scheme": "symmetric", "granularity": granularity},
    }
    if bits == 8:
        scales = observed.get(name)
        targets[INPUT] = _activation_config(method, scales.input if scales else None)
        if with_output:
            targets[_OUTPUT] = _activation_config(method, scales.output if scales else None)
    return {"op_names": [name], "quant_dtype": "int8", "target_names": list(targets), "target_settings": targets}


def _activation_config(method: str, observed: ActivationScale | None) -> dict[str, Any]:
    # LSQ has no zero points: what is negative needs signed integers.
    signed = method == "lsq" and observed is not None and observed.zero_point > 0
    return {"quant_dtype": "int8" if signed else "uint8", "quant_scheme": "affine", "granularity": "default"}


QUANTIZERS: dict[str, Any] = {"ptq": Ptq, "qat": Qat, "lsq": Lsq, "lsq_plus": LsqPlus, "dorefa": DoReFa, "bnn": Bnn}
