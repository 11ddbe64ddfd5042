"""NNI's pruners with a schedule: sparsity grows while the network trains.

"linear" grows evenly; "agp", automated gradual pruning (Zhu and Gupta 2017, arXiv 1710.01878),
fast at first and ever slower. Movement pruning has this cubic growth of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from nni.compression import TorchEvaluator, pruning
from torch import Tensor, nn

from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.nni_adapter.evaluator import TrainingFunction, TrainingStep, make_evaluator
from ray_nascomp.nni_adapter.pruning import make_pruner, weight_entries
from ray_nascomp.nni_adapter.pruning_targets import (
    GroupCounts,
    Masks,
    follower_entries,
    group_entries,
    heads_by_rows,
    read_removed,
)
from ray_nascomp.pruners import CHANNEL_METHODS, SCHEDULES, WEIGHT_METHODS, check_method, schedule_refusal
from ray_nascomp.tasks.base import Task

_MAX_UPDATES = 10
"""How many times a mask is made anew."""

OptimizerSettings = tuple[type[torch.optim.Optimizer], dict[str, Any]]


def scheduled_pruning(
    model: nn.Module,
    task: Task,
    method: str,
    schedule: str,
    groups: GroupCounts,
    train: TrainingFunction,
    steps: int,
    optimizer: OptimizerSettings,
    training_step: TrainingStep | None = None,
    spec: ModelSpec | None = None,
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Trains a copy while channels or heads are masked, ever more of them.

    Args:
        model: The model; its weights stay as they are.
        task: The task's loss.
        method: A method of `CHANNEL_METHODS`.
        schedule: One of `SCHEDULES`.
        groups: Name -> the group and the number of its units to remove.
        train: The training: (model, optimizer, step) -> None, an epoch or so. It is called once,
            and takes at least `steps` steps of the optimizer.
        steps: Over how many of its steps sparsity grows, 1 or more.
        optimizer: Class and arguments of the optimizer.
        training_step: Function (batch, model) -> loss; the task's loss if absent.
        spec: The model's structure; traced if absent.

    Returns:
        The removed units, group name -> ascending indices, as many as asked; and the copy's trained
        weights, keys as in `model.state_dict()`. What is left of them after the removal does what
        the masked copy did; but for channels that a layer normalisation sees, whose mean and
        deviation change with their number.

    Raises:
        ConfigError: For an unknown method or schedule, one that cannot follow the other, and for
            heads of a layer that makes queries, keys and values at once, where the output
            projection's channels are pruned as well.
    """
    check_method(method, CHANNEL_METHODS)
    spec = spec or ModelSpec.from_model(model, task.example_inputs)
    wanted = heads_by_rows({name: pair for name, pair in groups.items() if pair[1]}, method, spec)
    config = schedule_entries(model, wanted, method, spec)
    masks, state = _train(model, task, method, schedule, config, train, steps, optimizer, training_step)
    return read_removed(masks, wanted, method, spec), state


def scheduled_weight_masks(
    model: nn.Module,
    task: Task,
    method: str,
    schedule: str,
    sparsity: Mapping[str, float],
    train: TrainingFunction,
    steps: int,
    optimizer: OptimizerSettings,
    training_step: TrainingStep | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trains a copy while single weights are masked, ever more of them.

    Args:
        model: The model; its weights stay as they are.
        task: The task's loss.
        method: "level" or "movement_level".
        schedule: One of `SCHEDULES`.
        sparsity: Layer name -> share of weights to remove, in [0, 1).
        train: See `scheduled_pruning`, as all that follows.
        steps: Over how many of its steps sparsity grows.
        optimizer: Class and arguments of the optimizer.
        training_step: Function (batch, model) -> loss.

    Returns:
        Layer name -> mask of zeros and ones, shaped as the weight; and the copy's trained weights,
        in which those masked are not yet zero.

    Raises:
        ConfigError: For an unknown method or schedule, and one that cannot follow the other.
    """
    check_method(method, WEIGHT_METHODS)
    config = weight_entries(model, sparsity, method)
    masks, state = _train(model, task, method, schedule, config, train, steps, optimizer, training_step)
    return {name: targets["weight"].detach() for name, targets in masks.items()}, state


def _train(
    model: nn.Module,
    task: Task,
    method: str,
    schedule: str,
    config: list[dict[str, Any]],
    train: TrainingFunction,
    steps: int,
    optimizer: OptimizerSettings,
    training_step: TrainingStep | None,
) -> tuple[Masks, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    if not config:
        return {}, model.state_dict()
    evaluator = make_evaluator(model, task, train, optimizer, training_step)
    pruner, inner = make_scheduled(method, schedule, model, config, evaluator, steps)
    _, masks = pruner.compress(steps, None)
    pruner.unwrap_model()
    if method == "slim":
        _merge_factors(model, inner)
    return masks, model.state_dict()


def schedule_entries(model: nn.Module, groups: GroupCounts, method: str, spec: ModelSpec) -> list[dict[str, Any]]:
    """NNI's config for groups that are masked while the network trains."""
    config: list[dict[str, Any]] = []
    followers: list[dict[str, Any]] = []
    for group, count in groups.values():
        config += group_entries(model, group, count, method, spec)
        followers += follower_entries(group, method, spec)
    return config + followers


def make_scheduled(
    method: str, schedule: str, model: nn.Module, config: list[dict[str, Any]], evaluator: TorchEvaluator, steps: int
) -> tuple[Any, Any]:
    """NNI's pruner with a schedule, and the pruner of the method in it, which may be the same.

    Raises:
        ConfigError: For an unknown schedule, or one that the method cannot follow.
    """
    if schedule not in SCHEDULES:
        raise ConfigError.unknown("prune.schedule", schedule, SCHEDULES)
    reason = schedule_refusal(method, schedule)
    if reason is not None:
        raise ConfigError(f"prune.schedule: {schedule!r} was given with method {method!r}; {reason}")
    if method in ("movement", "movement_level"):
        pruner = make_pruner(method, model, config, evaluator, steps)
        return pruner, pruner
    updates = min(_MAX_UPDATES, steps)
    interval = steps // updates
    inner = make_pruner(method, model, config, evaluator, interval)
    return _SCHEDULED[schedule](inner, interval_steps=interval, total_times=updates), inner


def _merge_factors(model: nn.Module, pruner: pruning.SlimPruner) -> None:
    """The network has been trained with slim's factors in its weights; unwrapping leaves them out."""
    for layer, factors in pruner.scaling_factors.items():
        weight: Any = model.get_submodule(layer).weight
        scaler = pruner._target_spaces[layer]["weight"]._scaler
        with torch.no_grad():
            weight.mul_(scaler.expand(factors["weight"], list(weight.shape), keepdim=True, full_expand=False))


_SCHEDULED = {"linear": pruning.LinearPruner, "agp": pruning.AGPPruner}
