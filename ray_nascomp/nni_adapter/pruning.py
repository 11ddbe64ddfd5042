"""NNI's pruners: which channels, or which weights, are to go."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

from nni.compression import pruning
from torch import Tensor, nn

from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import GroupSpec
from ray_nascomp.nni_adapter.evaluator import make_evaluator, train_on
from ray_nascomp.plan import PRUNE_METHODS
from ray_nascomp.tasks.base import Task

_TAYLOR_STEPS = 16


def channels_to_remove(
    model: nn.Module, task: Task, method: str, groups: Mapping[str, tuple[GroupSpec, int]], seed: int
) -> dict[str, list[int]]:
    """The channels that NNI's pruner finds least important.

    Args:
        model: The model; its weights stay as they are.
        task: Data and loss, for the pruners that look at gradients.
        method: A structured method of `PRUNE_METHODS`.
        groups: Name -> the group and the number of its channels to remove.
        seed: Order of the training batches.

    Returns:
        Group name -> ascending channel indices, as many as asked.
    """
    wanted = {name: (group, count) for name, (group, count) in groups.items() if count}
    if not wanted:
        return {}
    # NNI removes floor(ratio * width): half a channel more makes the count exact.
    config = [
        {
            "op_names": list(group.layers),
            "sparse_ratio": (count + 0.5) / group.width,
            "dependency_group_id": name,
            "target_names": ["weight"],
        }
        for name, (group, count) in wanted.items()
    ]
    masks = _masks(model, task, method, config, seed)
    removed = {}
    for name, (group, count) in wanted.items():
        alive = masks[group.layers[0]].flatten(1).any(dim=1)
        dead = (~alive).nonzero().flatten().tolist()
        if len(dead) != count:
            raise RuntimeError(f"NNI's {method} removed {len(dead)} channels of group {name!r}; {count} were asked for")
        removed[name] = dead
    return removed


def weight_masks(model: nn.Module, task: Task, sparsity: Mapping[str, float]) -> dict[str, Tensor]:
    """Masks of NNI's level pruner: the smallest weights of each layer are zero in it.

    Args:
        model: The model; its weights stay as they are.
        task: The task.
        sparsity: Layer name -> share of weights to remove.

    Returns:
        Layer name -> mask of zeros and ones, shaped as the weight.
    """
    config = [
        {"op_names": [name], "sparse_ratio": float(value), "target_names": ["weight"]}
        for name, value in sparsity.items()
        if value > 0
    ]
    return _masks(model, task, "level", config, 0) if config else {}


def _masks(model: nn.Module, task: Task, method: str, config: list[dict[str, Any]], seed: int) -> dict[str, Tensor]:
    """Runs a pruner on a copy; returns the masks of the weights."""
    model = copy.deepcopy(model)
    if method == "taylor":
        batches = itertools.chain.from_iterable(task.train_batches(seed + epoch) for epoch in itertools.count())
        evaluator = make_evaluator(model, task, train_on(itertools.islice(batches, _TAYLOR_STEPS)))
        pruner = pruning.TaylorPruner(model, config, evaluator, training_steps=_TAYLOR_STEPS)
    elif method in _DATA_FREE:
        pruner = _DATA_FREE[method](model, config)
    else:
        raise ConfigError.unknown("prune.method", method, PRUNE_METHODS)
    _, masks = pruner.compress()
    return {name: targets["weight"].detach() for name, targets in masks.items()}


_DATA_FREE = {
    "l1_norm": pruning.L1NormPruner,
    "l2_norm": pruning.L2NormPruner,
    "fpgm": pruning.FPGMPruner,
    "level": pruning.LevelPruner,
}
