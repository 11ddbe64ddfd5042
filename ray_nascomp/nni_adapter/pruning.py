"""NNI's pruners on a trained network: which channels, heads or single weights are to go.

The methods, of which some look at the weights alone and some train a copy for a moment:

- l1_norm, l2_norm: smallest norm (Li et al. 2017, Pruning filters, arXiv 1608.08710).
- fpgm: nearest to the geometric median (He et al. 2019, arXiv 1811.00250).
- taylor: smallest effect on the loss (Molchanov et al. 2019, arXiv 1906.10771).
- slim: smallest learned factor (Liu et al. 2017, Network slimming, arXiv 1708.06519).
- movement: weights that training drives towards zero (Sanh et al. 2020, arXiv 2005.07683).
- level: smallest single weights. 2:4: the two smallest of every four inputs of a linear layer
  (Mishra et al. 2021, arXiv 2104.08378).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from nni.compression import TorchEvaluator, pruning
from torch import Tensor, nn

from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import GroupSpec, ModelSpec
from ray_nascomp.nni_adapter.evaluator import make_evaluator, no_training, register_subclasses, train_on
from ray_nascomp.nni_adapter.mends import mend_groups_of_mixed_layers, mend_order_in_memory
from ray_nascomp.nni_adapter.pruning_targets import GroupCounts, Masks, decisive_layers, group_entries, read_removed
from ray_nascomp.nni_adapter.slim import AlignedSlimPruner
from ray_nascomp.pruners import CHANNEL_METHODS, WEIGHT_METHODS, check_method
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.data import Batch

mend_groups_of_mixed_layers()
mend_order_in_memory()

_STEPS = {"taylor": 16, "slim": 32, "movement": 32, "movement_level": 32}
"""Training steps of the methods that look at data; the others look at the weights alone."""

_SLIM_PENALTY = 0.1
"""NNI's default of 1 drowns the loss on small networks: all factors shrink alike."""

_LEARNING_RATES = {"movement": 1e-2, "movement_level": 1e-2}
"""Movement is that of weights in training; for the other methods they stand still."""


def channels_to_remove(
    model: nn.Module,
    task: Task,
    method: str,
    groups: GroupCounts,
    seed: int,
    spec: ModelSpec | None = None,
) -> dict[str, list[int]]:
    """The units that NNI's pruner finds least important.

    Args:
        model: The model; its weights stay as they are.
        task: Data and loss, for the pruners that look at gradients.
        method: A method of `CHANNEL_METHODS`.
        groups: Name -> the group and the number of its units (channels, heads) to remove.
        seed: Order of the training batches, dropout.
        spec: The model's structure; traced if absent.

    Returns:
        Group name -> ascending indices of units, as many as asked.

    Raises:
        ConfigError: For an unknown method.
    """
    check_method(method, CHANNEL_METHODS)
    wanted = {name: (group, count) for name, (group, count) in groups.items() if count}
    if not wanted:
        return {}
    spec = spec or ModelSpec.from_model(model, task.example_inputs)
    removed: dict[str, list[int]] = {}
    for some in _without_shared_layers(wanted, method, spec):
        config = [entry for group, count in some.values() for entry in group_entries(model, group, count, method, spec)]
        removed.update(read_removed(_masks(model, task, method, config, seed), some, method, spec))
    return {name: removed[name] for name in wanted}


def unit_scores(
    model: nn.Module, task: Task, method: str, groups: Iterable[GroupSpec], seed: int, spec: ModelSpec
) -> dict[str, np.ndarray]:
    """How important NNI's pruner finds each unit.

    Args:
        model: The model; its weights stay as they are.
        task: Data and loss, for the pruners that look at gradients.
        method: A method of `CHANNEL_METHODS`.
        groups: The groups.
        seed: Order of the training batches, dropout.
        spec: The model's structure.

    Returns:
        Group name -> scores of shape `(width,)`, the mean over the layers that decide; the lowest units go
        first. Those of movement may be negative.

    Raises:
        ConfigError: For an unknown method.
    """
    check_method(method, CHANNEL_METHODS)
    wanted = {group.name: (group, 1) for group in groups}
    scores = {}
    for some in _without_shared_layers(wanted, method, spec):
        config = [entry for group, count in some.values() for entry in group_entries(model, group, count, method, spec)]
        metrics = _compress(model, task, method, config, seed)[1] if config else {}
        for name, (group, _) in some.items():
            layers = [metrics[layer]["weight"].flatten() for layer in decisive_layers(group, method, spec)]
            scores[name] = torch.stack(layers).double().mean(0).cpu().numpy()
    return scores


def weight_masks(
    model: nn.Module, task: Task, sparsity: Mapping[str, float], method: str = "level", seed: int = 0
) -> dict[str, Tensor]:
    """Masks of single weights.

    Args:
        model: The model; its weights stay as they are.
        task: The task.
        sparsity: Layer name -> share of weights to remove, in [0, 1); with "2:4", whatever is
            above 0 means one half.
        method: A method of `WEIGHT_METHODS`.
        seed: Order of the training batches, dropout.

    Returns:
        Layer name -> mask of zeros and ones, shaped as the weight.

    Raises:
        ConfigError: For an unknown method, and a layer that "2:4" cannot have.
    """
    check_method(method, WEIGHT_METHODS)
    config = weight_entries(model, sparsity, method)
    masks = _masks(model, task, method, config, seed) if config else {}
    return {name: targets["weight"].detach() for name, targets in masks.items()}


def weight_entries(model: nn.Module, sparsity: Mapping[str, float], method: str) -> list[dict[str, Any]]:
    """NNI's config for masks of single weights (see `weight_masks`)."""
    entries = []
    for name, value in sparsity.items():
        if value <= 0:
            continue
        entry: dict[str, Any] = {"op_names": [name], "sparse_ratio": float(value), "target_names": ["weight"]}
        if method == "movement_level":
            entry["granularity"] = [1]
        if method == "2:4":
            module: Any = model.get_submodule(name)
            if not isinstance(module, nn.Linear) or module.in_features % 4:
                raise ConfigError(
                    f"2:4 on {name!r}: a {type(module).__name__} was given; a linear layer whose inputs are a multiple "
                    "of 4 is allowed"
                )
            entry |= {
                "sparse_ratio": 0.5,
                "dependency_group_id": name,
                "internal_metric_block": module.weight.numel() // 4,
            }
        entries.append(entry)
    return entries


def make_pruner(
    method: str, model: nn.Module, config: list[dict[str, Any]], evaluator: TorchEvaluator, steps: int
) -> Any:
    """NNI's pruner for a method; it wraps the model.

    Args:
        method: A method of `CHANNEL_METHODS` or `WEIGHT_METHODS`.
        model: The model to wrap.
        config: NNI's config.
        evaluator: Training, for the methods that look at data.
        steps: How many training steps these look at.
    """
    register_subclasses(model, [name for entry in config for name in entry["op_names"]])
    if method == "taylor":
        return pruning.TaylorPruner(model, config, evaluator, training_steps=steps)
    if method == "slim":
        return AlignedSlimPruner(model, config, evaluator, training_steps=steps, regular_scale=_SLIM_PENALTY)
    if method in ("movement", "movement_level"):
        return pruning.MovementPruner(model, config, evaluator, warmup_step=steps // 4, cooldown_begin_step=steps)
    return _DATA_FREE[method](model, config, evaluator)


def _masks(model: nn.Module, task: Task, method: str, config: list[dict[str, Any]], seed: int) -> Masks:
    """The masks of a pruner that is run on a copy."""
    return _compress(model, task, method, config, seed)[0]


def _compress(
    model: nn.Module, task: Task, method: str, config: list[dict[str, Any]], seed: int
) -> tuple[Masks, dict[str, dict[str, Tensor]]]:
    """Runs a pruner on a copy; its masks, and the scores that they follow from."""
    model = copy.deepcopy(model)
    steps = _STEPS.get(method, 0)
    rate = _LEARNING_RATES.get(method, 0.0)
    train = train_on(itertools.islice(_endless(task, seed), steps)) if steps else no_training
    evaluator = make_evaluator(model, task, train, (torch.optim.SGD, {"lr": rate}))
    scores: dict[str, dict[str, Tensor]] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pruner = make_pruner(method, model, config, evaluator, steps)
        generate = pruner._generate_sparsity

        def note(found: dict[str, dict[str, Tensor]]) -> Any:
            scores.update(found)
            return generate(found)

        pruner._generate_sparsity = note
        scheduled = isinstance(pruner, pruning.MovementPruner)
        _, masks = pruner.compress(steps, None) if scheduled else pruner.compress()
    return masks, scores


def _endless(task: Task, seed: int) -> Iterator[Batch]:
    """Training batches, epoch after epoch."""
    return itertools.chain.from_iterable(task.train_batches((seed + epoch) % 2**31) for epoch in itertools.count())


def _without_shared_layers(groups: GroupCounts, method: str, spec: ModelSpec) -> list[GroupCounts]:
    """The groups in as few parts as it takes: NNI keeps one mask a weight, be it of rows or of columns."""
    columns = {name: pair for name, pair in groups.items() if pair[0].columns_of}
    rows = {name: pair for name, pair in groups.items() if name not in columns}
    taken = {layer for group, _ in rows.values() for layer in decisive_layers(group, method, spec)}
    if taken.isdisjoint(group.columns_of for group, _ in columns.values()):
        return [groups]
    return [rows, columns]


_DATA_FREE = {
    "l1_norm": pruning.L1NormPruner,
    "l2_norm": pruning.L2NormPruner,
    "fpgm": pruning.FPGMPruner,
    "level": pruning.LevelPruner,
    "2:4": pruning.LevelPruner,
}
