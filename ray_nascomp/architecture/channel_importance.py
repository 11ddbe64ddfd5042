"""How much the channels of a group matter, so that the best ones are kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.model_spec import GroupSpec, ModelSpec
from ray_nascomp.pruners import norms_of
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import call, device_of, map_tensors

_SAMPLES = 256


def channels_by_magnitude(model: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """Importance by weights: the norm of a channel's filter as it is after its batch normalisation.

    Args:
        model: The model.
        spec: Its structure.

    Returns:
        Group -> one value a channel, summed over the layers that produce it.
    """
    norms = {layer.folds_into: layer.name for layer in spec.layers if layer.folds_into is not None}
    scores = {}
    for group in _groups(spec):
        score = torch.zeros(group.width)
        for name in group.layers:
            layer: Any = model.get_submodule(name)
            filters = layer.weight.detach().flatten(1).norm(dim=1).cpu()
            if name in norms:
                norm: Any = model.get_submodule(norms[name])
                filters = filters * (norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()).cpu()
            score += filters
        scores[group.name] = score
    return scores


def channels_by_taylor(model: nn.Module, spec: ModelSpec, task: Task) -> dict[str, Tensor]:
    """Importance by how much the loss would change: squared products of parameters and their gradients.

    After Molchanov et al. (2019, arXiv 1906.10771), at the batch normalisations of a group where
    it has any and at its filters otherwise, summed over the batches of 256 training samples.

    Args:
        model: The model.
        spec: Its structure.
        task: Training data and loss.

    Returns:
        As `channels_by_magnitude`.
    """
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    gates = {group.name: norms_of(spec, group.name) or group.layers for group in _groups(spec)}
    scores = {group.name: torch.zeros(group.width) for group in _groups(spec)}
    count = 0
    device = device_of(model)
    for inputs, targets in task.train_batches(0):
        model.zero_grad()
        outputs = call(model, map_tensors(inputs, lambda tensor: tensor.to(device)))
        task.loss(outputs, targets.to(device)).backward()
        for group, names in gates.items():
            for name in names:
                products = [
                    (parameter * parameter.grad).detach().flatten(1).sum(1)
                    if parameter.dim() > 1
                    else (parameter * parameter.grad).detach()
                    for parameter in model.get_submodule(name).parameters(recurse=False)
                    if parameter.grad is not None
                ]
                scores[group] += sum(products, torch.zeros(1, device=device)).square().cpu()
        count += len(targets)
        if count >= _SAMPLES:
            break
    return scores


def _groups(spec: ModelSpec) -> list[GroupSpec]:
    return [group for group in spec.prunable_groups if not group.is_heads]
