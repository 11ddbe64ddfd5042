"""A candidate: a task's model after the stages that change its structure, really smaller."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ray_nascomp import registry
from ray_nascomp.compression.attention import find_attentions, remove_heads
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.compression.graph import remove_channels
from ray_nascomp.compression.low_rank import factorise, input_covariances
from ray_nascomp.costs import CostModel
from ray_nascomp.model_spec import GroupSpec, ModelSpec
from ray_nascomp.nni_adapter.fused import fused_compression
from ray_nascomp.nni_adapter.pruning import channels_to_remove, weight_masks
from ray_nascomp.nni_adapter.scales import Calibration
from ray_nascomp.nni_adapter.scheduled import scheduled_pruning, scheduled_weight_masks
from ray_nascomp.pipeline.memory_format import is_faster_channels_last
from ray_nascomp.pipeline.recipe import Recipe
from ray_nascomp.pipeline.training import Trainer
from ray_nascomp.plan import CompressionPlan
from ray_nascomp.pruners import weight_refusal
from ray_nascomp.quantizers import bits_for
from ray_nascomp.tasks.base import Task

if TYPE_CHECKING:
    from ray_nascomp.pipeline.reuse import Reuse

_MOMENTUM = 0.1
"""Torch's default."""


@dataclass
class Candidate:
    """A network on its way through the stages.

    Attributes:
        plan: What it is made from.
        network: The network, its removed channels gone.
        spec: The architecture before channels were removed and layers factorised.
        removed: Group name -> indices of the removed units, as the original counts them.
        masks: Layer name -> mask of single weights that are zero and stay so.
        factors: Layer name -> names of the layers that it has become.
        is_prepared: Whether the network has been folded and smoothed, for training with simulated
            integers.
        smoothed: Name of each linear layer that was smoothed for that -> its name since then.
        calibration: Scales that such training has left.
    """

    plan: CompressionPlan
    network: nn.Module
    spec: ModelSpec
    removed: dict[str, list[int]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    is_prepared: bool = False
    smoothed: dict[str, str] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=dict)

    @classmethod
    def start(cls, task: Task, plan: CompressionPlan) -> Candidate:
        """The plan's architecture, from which the stages go on.

        Raises:
            InfeasibleError: If the architecture does not run.
        """
        network, spec = task.architectures.trace(plan.architecture)
        train_all(network)
        return cls(plan, network, spec)

    @property
    def is_changed(self) -> bool:
        """Whether the network differs from the task's own model."""
        return bool(self.plan.architecture or self.plan.stages or self.removed or self.masks or self.factors)

    @property
    def bits(self) -> dict[str, int]:
        """Name of each layer of the network with fewer than 32 bits -> its bits."""
        bits: dict[str, int] = {}
        for layer in self.spec.quantizable_layers:
            wanted = self.plan.quantize.of(layer.config_name)
            if wanted == 32:
                continue
            first, *rest = self.factors.get(layer.name, (layer.name,))
            bits[first] = bits_for(layer.kind, wanted)
            bits |= dict.fromkeys(rest, wanted)  # Those of an embedding are linear layers.
        return bits


def train_all(network: nn.Module) -> None:
    """Lets all of the network be trained, whatever was frozen in the task's own; statistics of batches too."""
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum == 0:
            module.momentum = _MOMENTUM


def make_candidate(
    task: Task, plan: CompressionPlan, costs: CostModel, trainer: Trainer, reuse: Reuse | None = None
) -> Candidate:
    """Carries out the stages that change the structure, in the plan's order.

    Args:
        task: The task.
        plan: The plan, resolved.
        costs: The task's cost model, which counts what goes.
        trainer: How scheduled pruning trains.
        reuse: Where stages that others have carried out are found, and these are kept.

    Raises:
        InfeasibleError: If the plan cannot be carried out.
    """
    recipe = Recipe(task, plan, costs, trainer.epochs)
    known, done = reuse.longest(task, plan, recipe) if reuse is not None else (None, 0)
    candidate = known or Candidate.start(task, plan)
    for number, name in enumerate(recipe.stages[done:], start=done + 1):
        carry_out(candidate, task, name, costs, trainer, recipe.seed(number))
        if reuse is not None and number < len(recipe.stages):
            reuse.keep_candidate(recipe.structure(number), task, candidate, costs.ranks(plan))
    return candidate


def carry_out(candidate: Candidate, task: Task, stage: str, costs: CostModel, trainer: Trainer, seed: int) -> None:
    """Carries out one stage that changes the structure.

    Args:
        candidate: The candidate, which has the stages before it behind it.
        task: The task.
        stage: The stage's name.
        costs: The task's cost model.
        trainer: How scheduled pruning trains.
        seed: For whatever is random.

    Raises:
        InfeasibleError: If it cannot be carried out.
    """
    if stage == "prune":
        _prune(candidate, task, costs.removed(candidate.plan), trainer.for_pruning(seed), seed)
    elif stage == "low_rank":
        _factorise(candidate, task, costs.ranks(candidate.plan))
    else:
        _apply(candidate, task, stage, seed)


def rebuild_candidate(
    task: Task,
    plan: CompressionPlan,
    removed: dict[str, list[int]],
    ranks: Mapping[str, int],
    stages: Sequence[str] | None = None,
) -> Candidate:
    """A candidate with the structure that another had; its weights are still to be loaded.

    Args:
        task: The task.
        plan: The plan, resolved.
        removed: Group name -> indices of the removed units.
        ranks: Layer name -> rank.
        stages: The stages that change the structure and that it has behind it; all if absent.

    Raises:
        InfeasibleError: If the architecture does not run.
    """
    candidate = Candidate.start(task, plan)
    for stage in plan.order if stages is None else stages:
        if stage == "prune":
            candidate.removed = removed
            _remove_units(candidate, task, removed)
        elif stage == "low_rank":
            candidate.factors = factorise(candidate.network, ranks) if ranks else {}
        elif stage in plan.stages:
            _apply(candidate, task, stage, 0)  # The structure follows from the options alone, the weights are replaced.
    return candidate


def _apply(candidate: Candidate, task: Task, name: str, seed: int) -> None:
    """Carries out a user's own stage."""
    stage = registry.registered("stage")[name]()
    options = candidate.plan.stages[name]
    candidate.network = stage.apply(candidate.network, task, options, seed)
    candidate.spec = stage.specify(candidate.spec, options)


def _remove_units(candidate: Candidate, task: Task, removed: Mapping[str, list[int]]) -> None:
    """Removes channels and heads from the candidate's network; indices count what it still has."""
    groups = {group.name: _renamed_group(group, candidate.factors) for group in candidate.spec.groups}
    attentions = {found.name: found for found in find_attentions(candidate.network)}
    channels = {}
    for name, units in removed.items():
        if groups[name].is_heads:
            remove_heads(candidate.network, attentions[name], units)
        else:
            channels[groups[name].layers[0]] = units
    remove_channels(candidate.network, task.example_inputs, channels)


def _prune(candidate: Candidate, task: Task, counts: Mapping[str, int], trainer: Trainer, seed: int) -> None:
    plan, network = candidate.plan, candidate.network
    if plan.prune.is_identity:
        return
    if not plan.prune.removes_units:
        candidate.masks = _weight_masks(candidate, task, trainer, seed)
        for name, mask in candidate.masks.items():
            weight: Any = network.get_submodule(name).weight
            weight.data.mul_(mask)
        return
    removed = candidate.removed
    more = {name: count - len(removed.get(name, ())) for name, count in counts.items()}
    groups = {
        group.name: (_remaining_group(group, candidate), more[group.name])
        for group in candidate.spec.prunable_groups
        if more.get(group.name)
    }
    if not groups:
        return
    spec = candidate.spec if not candidate.factors and not removed else None
    method = plan.prune.method
    if plan.prune.schedule == "fused":
        fold_batch_norm(network, task.example_inputs)
        train_all(network)
        fused = fused_compression(
            network,
            task,
            groups,
            candidate.bits,
            **_training(trainer, task, network),
            prune_method=method,
            quantize_method=plan.quantize.method,
            distill_weight=plan.finetune.distill.weight,
        )
        chosen, candidate.calibration, candidate.is_prepared = fused.removed, fused.calibration, True
        network.load_state_dict(fused.state)
    elif plan.prune.schedule != "one_shot":
        chosen, state = scheduled_pruning(
            network, task, method, plan.prune.schedule, groups, **_training(trainer, task, network), spec=spec
        )
        network.load_state_dict(state)
    elif method in registry.registered("pruner"):
        chosen = _own_choice(network, task, method, groups, seed)
    else:
        chosen = channels_to_remove(network, task, method, groups, seed, spec)
    _remove_units(candidate, task, chosen)
    candidate.removed = _merged(candidate, chosen)


def _remaining_group(group: GroupSpec, candidate: Candidate) -> GroupSpec:
    """The group as the candidate's network has it."""
    gone = len(candidate.removed.get(group.name, ()))
    return replace(_renamed_group(group, candidate.factors), width=group.width - gone)


def _merged(candidate: Candidate, chosen: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Removed units by their places in the original, when `chosen` counts those that were left."""
    merged = dict(candidate.removed)
    for group in candidate.spec.groups:
        if group.name in chosen:
            gone = merged.get(group.name, [])
            left = [unit for unit in range(group.width) if unit not in set(gone)]
            merged[group.name] = sorted([*gone, *(left[unit] for unit in chosen[group.name])])
    return merged


def _weight_masks(candidate: Candidate, task: Task, trainer: Trainer, seed: int) -> dict[str, Tensor]:
    prune = candidate.plan.prune
    kinds = {layer.name: layer for layer in candidate.spec.layers}
    sparsity: dict[str, float] = {}
    for group in candidate.spec.prunable_groups:
        for layer in group.layers:
            owner = task.spec.group_of(layer)
            if owner is not None and weight_refusal(prune.method, kinds[layer]) is None:
                sparsity |= dict.fromkeys(candidate.factors.get(layer, (layer,)), prune.of(owner.name))
    if prune.schedule == "one_shot":
        return weight_masks(candidate.network, task, sparsity, prune.method, seed)
    masks, state = scheduled_weight_masks(
        candidate.network, task, prune.method, prune.schedule, sparsity, **_training(trainer, task, candidate.network)
    )
    candidate.network.load_state_dict(state)
    return masks


def _training(trainer: Trainer, task: Task, network: nn.Module) -> dict[str, Any]:
    """An epoch of the plan's own training of a copy of the network, as scheduled pruners take it."""
    trainer.is_channels_last = is_faster_channels_last(network, task)
    batches = -(-len(task.train_data) // task.batch_size)
    return {
        "train": lambda model, optimizer, step: trainer.epoch(model, optimizer, 0, step),
        "steps": max(1, batches - 1),
        "optimizer": trainer.optimizer_settings,
        "training_step": trainer.loss,
    }


def _own_choice(
    network: nn.Module, task: Task, method: str, groups: Mapping[str, tuple[GroupSpec, int]], seed: int
) -> dict[str, list[int]]:
    """The lowest units by a user's pruner."""
    pruner = registry.registered("pruner")[method]()
    importance = pruner.importance(
        copy.deepcopy(network), task, {name: group for name, (group, _) in groups.items()}, seed
    )
    removed = {}
    for name, (group, count) in groups.items():
        values = np.asarray(importance[name], float)
        if values.shape != (group.width,) or not np.isfinite(values).all():
            raise ValueError(
                f"pruner {method!r}: for group {name!r} it gave values of shape {values.shape}, {group.width} finite "
                "numbers are needed"
            )
        removed[name] = sorted(np.argsort(values, kind="stable")[:count].tolist())
    return removed


def _factorise(candidate: Candidate, task: Task, ranks: Mapping[str, int]) -> None:
    ranks = {name: rank for name, rank in ranks.items() if name not in candidate.factors}
    if not ranks:
        return
    covariances = input_covariances(candidate.network, ranks, task.calibration_batches())
    candidate.factors |= factorise(candidate.network, ranks, covariances)
    for name in candidate.factors:
        candidate.masks.pop(name, None)


def _renamed_group(group: GroupSpec, factors: Mapping[str, tuple[str, ...]]) -> GroupSpec:
    """The group with its producers' last factors, and the first of the layer that reads heads."""
    layers = tuple(factors.get(layer, (layer,))[-1] for layer in group.layers)
    columns_of = factors.get(group.columns_of, (group.columns_of,))[0] if group.columns_of else None
    return replace(group, layers=layers, columns_of=columns_of)
