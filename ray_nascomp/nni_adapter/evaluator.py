"""NNI's evaluator made from a task: the loop through which its compressors train and observe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from nni.compression.base.setting import PruningSetting, QuantizationSetting
from torch import nn

from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import call, device_of, map_tensors
from ray_nascomp.tasks.data import Batch

logging.getLogger("nni").setLevel(logging.ERROR)

TrainingStep = Callable[[Batch, nn.Module], torch.Tensor]
TrainingFunction = Callable[[nn.Module, torch.optim.Optimizer, TrainingStep], None]


class _Evaluator(TorchEvaluator):
    """NNI's evaluator, for optimizers of one group of parameters.

    To find the group for a quantizer's scales NNI reads the names of all parameters, and fails at
    one that belongs to the model itself: a class token, a table of positions.
    """

    def _optimizer_add_param_group(
        self, model: nn.Module, module_name_param_dict: dict[str, list[torch.Tensor]], optimizers: Any
    ) -> None:
        for parameters in module_name_param_dict.values():
            optimizers[0].param_groups[0]["params"].extend(parameters)


def make_evaluator(
    model: nn.Module,
    task: Task,
    train: TrainingFunction,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] = (torch.optim.SGD, {"lr": 0.0}),
    training_step: TrainingStep | None = None,
    observed: Iterable[Any] | None = None,
) -> TorchEvaluator:
    """An evaluator for one compressor.

    Args:
        model: The model that is compressed.
        task: Loss and calibration data.
        train: What NNI calls to train: (model, optimizer, step). It may train as it likes.
        optimizer: Class and arguments; NNI makes one over the wrapped parameters.
        training_step: Function (batch, model) -> loss; the task's loss if absent.
        observed: Inputs that quantizers observe; those of the task's calibration batches if absent.
    """

    def training_function(
        wrapped: nn.Module, optimizers: Any, step: Any, _schedulers: Any = None, _steps: Any = None, _epochs: Any = None
    ) -> None:
        train(wrapped, optimizers, step)

    def task_loss(batch: Batch, wrapped: nn.Module) -> torch.Tensor:
        inputs, targets = to_device(batch, wrapped)
        return task.loss(call(wrapped, inputs), targets)

    def observe(wrapped: nn.Module) -> float:
        predict = task.predict(wrapped)
        for inputs in (inputs for inputs, _ in task.calibration_batches()) if observed is None else observed:
            predict(inputs)
        return 0.0

    optimizer_class, arguments = optimizer
    return _Evaluator(
        training_function,
        nni.trace(optimizer_class)(model.parameters(), **arguments),
        training_step or task_loss,
        evaluating_func=observe,
    )


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device."""
    device = device_of(model)
    return map_tensors(batch[0], lambda tensor: tensor.to(device)), batch[1].to(device)


def train_on(batches: Iterable[Batch]) -> TrainingFunction:
    """A training function that takes one optimizer step a batch."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: TrainingStep) -> None:
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    return train


def no_training(_model: nn.Module, _optimizer: torch.optim.Optimizer, _step: TrainingStep) -> None:
    """A training function that does nothing: post-training quantization observes only."""


def register_subclasses(model: nn.Module, names: Iterable[str]) -> None:
    """Makes NNI treat a layer of a class that it does not know as the class of torch that it derives from.

    NNI goes by the name of a module's class, and fails on a convolution that a library has derived.
    """
    for name in names:
        module = model.get_submodule(name)
        for setting in (PruningSetting, QuantizationSetting):
            if type(module).__name__ in setting.registry:
                continue
            known = next((cls for cls in type(module).__mro__ if cls.__name__ in setting.registry), None)
            if known is not None:
                setting.register(type(module).__name__, setting.registry[known.__name__])


def weight_of(module: nn.Module) -> Any:
    """The weight that training changes; while NNI wraps a layer, its wrapper holds it."""
    return getattr(module, "_nni_wrapper", module).weight
