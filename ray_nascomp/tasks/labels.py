"""Targets that are classes: their accuracy, samples that have none, and what is no class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.data import IGNORED, Data


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of places whose largest logit is their class's.

    Raises:
        ConfigError: If there is not one class for each row of logits.
    """
    if outputs.shape[:-1] != targets.shape:
        raise ConfigError(
            f"metric: accuracy needs one class index for each row of logits; outputs of shape {tuple(outputs.shape)} "
            f"and targets of shape {tuple(targets.shape)} were given"
        )
    return (outputs.argmax(dim=-1) == targets).float().mean().item()


def labelled_loss(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of those samples that have a label; 0 where none has."""
    unlabelled = _unlabelled(targets)
    if not unlabelled.any():
        return loss(outputs, targets)
    if unlabelled.all():
        return outputs.sum() * 0.0
    return loss(outputs[~unlabelled], targets[~unlabelled])


def refuse_unlabelled(targets: Tensor) -> None:
    """Raises a ConfigError if a sample that is to be judged has no label."""
    if missing := int(_unlabelled(targets).sum()):
        raise ConfigError(
            f"{missing} of {len(targets)} samples that are to be judged have no label (class {IGNORED}); "
            "only training samples may lack one"
        )


def refuse_odd_classes(data: Data, name: str) -> None:
    """Raises a ConfigError if targets at hand are none that cross entropy takes.

    Args:
        data: The samples.
        name: What they are called in errors.
    """
    targets = data.targets
    if targets is None or (targets.is_floating_point() and targets.dim() > 1):  # Shares of classes.
        return
    if targets.dtype not in (torch.int64, torch.uint8):
        raise ConfigError(
            f"{name}: targets of {targets.dtype} were given; "
            "allowed: classes of torch.int64, or a loss that takes others"
        )
    if len(odd := targets[(targets < 0) & (targets != IGNORED)]):
        raise ConfigError(
            f"{name}: class {int(odd[0])} was given; allowed: 0 and up, and {IGNORED} for what has no label"
        )


def refuse_classes_beyond(outputs: Tensor, data: Data, name: str) -> None:
    """Raises a ConfigError if a class at hand is none of those that the outputs tell apart.

    Args:
        outputs: Logits of some samples, shape `(samples, classes)`; of others nothing is said.
        data: The samples.
        name: What they are called in errors.
    """
    targets = data.targets
    if outputs.dim() != 2 or targets is None or targets.dim() != 1:
        return
    if (largest := int(targets.max())) >= outputs.shape[1]:
        raise ConfigError(
            f"{name}: class {largest} was given; allowed: 0 to {outputs.shape[1] - 1}, what the model tells apart"
        )


def _unlabelled(targets: Tensor) -> Tensor:
    """Which samples have no label, a mask; none where a target is more than a class."""
    if targets.dim() != 1 or targets.is_floating_point():
        return torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    return targets == IGNORED
