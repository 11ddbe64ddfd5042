"""A candidate: a task's model after architecture and pruning, really smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ray_nascomp.compression.graph import remove_channels
from ray_nascomp.costs import removed_channels
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.nni_adapter.pruning import channels_to_remove, weight_masks
from ray_nascomp.plan import CompressionPlan
from ray_nascomp.tasks.base import Task


@dataclass
class Candidate:
    """A network on its way through the stages.

    Attributes:
        plan: What it is made from.
        network: The network, its removed channels gone.
        spec: The architecture before channels were removed.
        removed: Group name -> indices of the removed channels.
        masks: Layer name -> mask of single weights that are zero and stay so.
    """

    plan: CompressionPlan
    network: nn.Module
    spec: ModelSpec
    removed: dict[str, list[int]]
    masks: dict[str, Tensor]

    @property
    def is_changed(self) -> bool:
        """Whether the network differs from the task's own model."""
        return bool(self.plan.architecture or self.removed or self.masks)

    @property
    def removed_counts(self) -> dict[str, int]:
        """Group name -> number of removed channels."""
        return {name: len(indices) for name, indices in self.removed.items()}


def make_candidate(task: Task, plan: CompressionPlan) -> Candidate:
    """Carries out architecture and pruning.

    Raises:
        InfeasibleError: If the plan cannot be carried out.
    """
    network, spec = task.trace(plan.architecture)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # All of the network is trained back.
    counts = removed_channels(plan, task.spec, spec)
    masks: dict[str, Tensor] = {}
    removed: dict[str, list[int]] = {}
    if plan.prune.method == "level":
        sparsity = {
            layer: plan.prune.of(owner.name)
            for group in spec.prunable_groups
            for layer in group.layers
            if (owner := task.spec.group_of(layer)) is not None
        }
        masks = weight_masks(network, task, sparsity)
        for name, mask in masks.items():
            weight: Any = network.get_submodule(name).weight
            weight.data.mul_(mask)
    else:
        groups = {group.name: (group, counts[group.name]) for group in spec.prunable_groups if counts.get(group.name)}
        removed = channels_to_remove(network, task, plan.prune.method, groups, plan.seed)
        remove_channels(network, task.example_inputs, removed)
    return Candidate(plan, network, spec, removed, masks)
