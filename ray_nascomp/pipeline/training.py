"""Fine-tuning: epochs of AdamW with warm-up and cosine decay, with distillation from the task's teacher."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ray_nascomp.compression.denoise import noised
from ray_nascomp.compression.distill import distillation_loss
from ray_nascomp.errors import NonFiniteModelError
from ray_nascomp.nni_adapter.distillation import LayerwiseDistillation
from ray_nascomp.nni_adapter.evaluator import TrainingStep, to_device, weight_of
from ray_nascomp.pipeline.memory_format import channels_last, is_faster_channels_last
from ray_nascomp.pipeline.precision import mixed_precision
from ray_nascomp.plan import FinetuneStage
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import batch_size_of, call, device_of
from ray_nascomp.tasks.data import Batch

_WARMUP_SHARE = 0.1
_MAX_GRADIENT_NORM = 5.0
_RATE_EXPONENT = -0.32


def learning_rate(peak: float, progress: float) -> float:
    """The rate at a share of the whole training: linear warm-up, then a cosine to zero."""
    if progress < _WARMUP_SHARE:
        return peak * max(progress, 0.01) / _WARMUP_SHARE
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)))


def with_longer_training(config: Mapping[str, Any], times: float) -> dict[str, Any]:
    """The config with the peak learning rate for a training that is so many times as long.

    The best rate falls as the training grows longer, with its power of -0.32 (Bjorck et al. 2024, arXiv
    2409.19913): one that a search has found best for three epochs may be so high that thirty do not converge.

    Args:
        config: The config, nested.
        times: Length of the training in that for which the rate was found; up to 1 leaves it as it is.
    """
    finetune = config.get("finetune", {})
    rate = finetune.get("lr", FinetuneStage.lr) * max(1.0, times) ** _RATE_EXPONENT
    return {**config, "finetune": {**finetune, "lr": rate}}


OnProgress = Callable[[Literal["teacher", "pruning", "training"], float], None]
"""Is told what is being done, and how much of it is done."""


def unseen(doing: str, done: float) -> None:
    """Progress that nobody looks at."""


class Trainer:
    """Trains a network, epoch by epoch, as a plan says.

    Args:
        task: Data and loss.
        stage: Learning rate, weight decay, distillation.
        epochs: Length of the whole training, which the learning rate follows.
        seed: Order of the batches, dropout.
        macs: Multiply-accumulates of one sample; large networks train in bfloat16 where the processor has it.
        teacher_macs: Those that the teacher has at least; a large one teaches in bfloat16 likewise.

    Attributes:
        epochs: Length of the whole training.
        masks: Layer name -> mask of its weight; masked weights stay zero.
        maps: What the layer-wise distillation has learned of its own, from epoch to epoch.
        is_channels_last: Whether the network trains with channels last in memory (see `is_faster_channels_last`).
        on_progress: Called before each batch with "training" and the epochs that are done, a fraction, or while
            scheduled pruning trains with "pruning" and the share of it; before that, where the teacher is asked about
            all samples once, with "teacher" and the share that it has read.
    """

    def __init__(
        self,
        task: Task,
        stage: FinetuneStage,
        epochs: int,
        seed: int,
        macs: float = 0.0,
        teacher_macs: float = 0.0,
    ) -> None:
        self._task = task
        self._stage = stage
        self.epochs = epochs
        self._seed = seed
        self._macs = macs
        self.masks: Mapping[str, Tensor] = {}
        self._teacher = _teacher_of(task, teacher_macs) if stage.distill.weight else None
        self._layerwise: LayerwiseDistillation | None = None
        self.maps: list[Tensor] = []
        self.is_channels_last = False
        self._indices: Tensor | None = None
        self.on_progress: OnProgress = unseen
        self.optimizer_settings: tuple[type[torch.optim.Optimizer], dict[str, Any]] = (
            torch.optim.AdamW,
            {"lr": stage.lr, "weight_decay": stage.weight_decay, "fused": True},
        )

    def for_pruning(self, seed: int) -> Trainer:
        """A trainer like this one for scheduled pruning, with another seed and nothing learned."""
        trainer = copy.copy(self)
        trainer._seed, trainer.masks, trainer.maps = seed, {}, []
        trainer.on_progress = lambda doing, done: self.on_progress("pruning" if doing == "training" else doing, done)
        return trainer

    def make_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """An optimizer over the network's parameters."""
        optimizer_class, arguments = self.optimizer_settings
        return optimizer_class(network.parameters(), **arguments)

    def epoch(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, step: TrainingStep | None = None
    ) -> None:
        """One pass over the training data.

        Args:
            network: The network, trained in place.
            optimizer: Its optimizer.
            epoch: Which epoch this is, from 0.
            step: Function (batch, network) -> loss; `loss` if absent.

        Raises:
            NonFiniteModelError: If a parameter is not finite any more.
        """
        step = step or self.loss
        seed = (self._seed + epoch) % 2**31
        data = self._task.train_data
        generator = torch.Generator().manual_seed(seed)
        batches = self._task.epoch_indices(generator)
        weights = {name: weight_of(network.get_submodule(name)) for name in self.masks}
        # Wrapping changes the order of parameters, and with it the last digit of the norm.
        ordered = [parameter for _, parameter in sorted(network.named_parameters())]
        network.train()
        in_memory = channels_last(network, self.is_channels_last, optimizer)
        with torch.random.fork_rng(), in_memory, self._layerwise_distillation(network) as maps:
            torch.manual_seed(seed)
            for number, indices in enumerate(batches):
                if len(indices) == 1 and number > 0:
                    continue  # Batch normalisation cannot train on a single sample.
                done = epoch + number / len(batches)
                self.on_progress("training", done)
                rate = learning_rate(self._stage.lr, done / self.epochs)
                optimizers = [optimizer] if maps is None else [optimizer, maps]
                self._indices = indices
                for each in optimizers:
                    for group in each.param_groups:
                        group["lr"] = rate
                    each.zero_grad()
                step(data.take(indices), network).backward()
                nn.utils.clip_grad_norm_(ordered, _MAX_GRADIENT_NORM)
                for each in optimizers:
                    each.step()
                with torch.no_grad():
                    for name, mask in self.masks.items():
                        weights[name].mul_(mask.to(weights[name].device))
        self._indices = None
        if not all(parameter.isfinite().all() for parameter in ordered):
            raise NonFiniteModelError(f"weights are not finite after epoch {epoch + 1}; try a lower finetune/lr")

    def loss(self, batch: Batch, network: nn.Module) -> Tensor:
        """The task's loss, mixed with the distillation loss."""
        inputs, targets = to_device((self._task.without_padding(batch[0]), batch[1]), network)
        distill = self._stage.distill
        clean = inputs
        if self._teacher is not None and distill.noise and network.training:
            inputs = noised(inputs, distill.noise)
        with mixed_precision(targets.device, self._task, self._macs):
            outputs = call(network, inputs)
        if outputs.dtype == torch.bfloat16:
            outputs = outputs.float()
        loss = self._task.loss(outputs, targets)
        if self._teacher is None:
            return loss
        teacher = self._teacher.outputs(self._task, clean, self._indices, self.on_progress).to(outputs.device)
        taught = distillation_loss(outputs.float(), teacher, targets, distill.temperature)
        if self._layerwise is not None:
            taught = taught + self._layerwise.loss(clean)
        return (1 - distill.weight) * loss + distill.weight * taught

    @contextmanager
    def _layerwise_distillation(self, network: nn.Module) -> Iterator[torch.optim.Optimizer | None]:
        """Layer-wise distillation for as long as the context lasts; yields the optimizer of its maps, if it has any."""
        if self._stage.distill.layers == "none" or self._teacher is None:
            yield None
            return
        self._layerwise = LayerwiseDistillation(network, self._task, self._stage.distill.layers, self._seed % 2**31)
        parameters = self._layerwise.parameters()
        with torch.no_grad():
            for parameter, known in zip(parameters, self.maps, strict=bool(self.maps)):
                parameter.copy_(known)
        try:
            yield torch.optim.AdamW(parameters, self._stage.lr) if parameters else None
        finally:
            self._layerwise.close()
            self._layerwise = None
            self.maps = [parameter.detach().clone() for parameter in parameters]


class _Teacher:
    """The teacher's outputs; computed once a sample where samples are always the same."""

    def __init__(self, task: Task, macs: float) -> None:
        # It knows no task, so that it is forgotten with its own.
        self._in_full = task.teacher.predict(task.teacher.model)
        self._macs = macs
        self._known: Tensor | None = None

    def outputs(self, task: Task, inputs: object, indices: Tensor | None, on_progress: OnProgress) -> Tensor:
        if indices is None or not task.train_data.is_fixed:
            return self._predict(task, inputs)
        if self._known is None:  # Trials that end before they are trained never need it.
            self._known = self._all_outputs(task, on_progress)
        return self._known[indices]

    def _all_outputs(self, task: Task, on_progress: OnProgress) -> Tensor:
        read = 0

        def predict(inputs: object) -> Tensor:
            nonlocal read
            on_progress("teacher", read / len(task.train_data))
            read += batch_size_of(inputs)
            return self._predict(task, inputs)

        model = task.teacher.model
        with channels_last(model, is_faster_channels_last(model, task.teacher)):
            outputs, _ = task.outputs(predict, task.train_data)
        return outputs

    def _predict(self, task: Task, inputs: object) -> Tensor:
        with mixed_precision(device_of(task.teacher.model), task.teacher, self._macs):
            outputs = self._in_full(inputs)
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


_teachers: weakref.WeakKeyDictionary[Task, _Teacher] = weakref.WeakKeyDictionary()


def _teacher_of(task: Task, macs: float) -> _Teacher:
    if task not in _teachers:
        _teachers[task] = _Teacher(task, macs)
    return _teachers[task]
