"""How much heads and neurons matter, so that the best ones are kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.architecture.blocks import Block
from ray_nascomp.compression.attention import Attention
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import call, device_of, map_tensors

_SAMPLES = 256


def by_magnitude(model: nn.Module, blocks: tuple[Block, ...]) -> dict[str, Tensor]:
    """Importance by weights: the norm of what makes a head or a neuron times that of what reads it.

    Args:
        model: The model.
        blocks: Its blocks.

    Returns:
        Name of an attention -> one value a head (of a unit, with grouped queries); name of a
        feed-forward's last layer -> one value a neuron.
    """
    scores: dict[str, Tensor] = {}
    for block in blocks:
        for attention in block.attentions:
            scores[attention.name] = sum(
                (_value_norms(model, member) * _unit_norms(model, member) for member in attention.members),
                torch.zeros(attention.units),
            )
        if (feed_forward := block.feed_forward) is not None:
            made = [_rows(model.get_submodule(name)).norm(dim=1) for name in feed_forward.expand]
            read = _rows(model.get_submodule(feed_forward.contract)).norm(dim=0)
            scores[feed_forward.contract] = torch.stack(made).prod(0) * read
    return scores


def by_taylor(model: nn.Module, blocks: tuple[Block, ...], task: Task) -> dict[str, Tensor]:
    """Importance by how much the loss would change: squared products of outputs and their gradients.

    After Molchanov et al. (2019, arXiv 1906.10771) for neurons and Michel, Levy and Neubig (2019,
    arXiv 1905.10650) for heads, summed over 256 training samples.

    Args:
        model: The model.
        blocks: Its blocks.
        task: Training data and loss.

    Returns:
        As `by_magnitude`.
    """
    model = copy.deepcopy(model).eval()
    readers: dict[str, tuple[str, int]] = {}
    scores: dict[str, Tensor] = {}
    for block in blocks:
        for attention in block.attentions:
            scores[attention.name] = torch.zeros(attention.units)
            readers |= {member.output: (attention.name, attention.units) for member in attention.members}
        if (feed_forward := block.feed_forward) is not None:
            scores[feed_forward.contract] = torch.zeros(feed_forward.width)
            readers[feed_forward.contract] = (feed_forward.contract, feed_forward.width)
    seen: dict[str, Tensor] = {}
    for name in readers:
        model.get_submodule(name).register_forward_pre_hook(_remember(seen, name))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    count = 0
    device = device_of(model)
    for inputs, targets in task.train_batches(0):
        model.zero_grad()
        outputs = call(model, map_tensors(inputs, lambda tensor: tensor.to(device)))
        task.loss(outputs, targets.to(device)).backward()
        for name, (group, units) in readers.items():
            values = seen[name]
            if values.grad is not None:
                product = (values * values.grad).detach().flatten(0, -2)
                scores[group] += product.unflatten(-1, (units, -1)).sum(-1).square().sum(0).cpu()
        count += len(targets)
        if count >= _SAMPLES:
            break
    return scores


def _remember(seen: dict[str, Tensor], name: str) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        seen[name] = inputs[0]

    return hook


def _rows(layer: Any) -> Tensor:
    """The weight with a row an output."""
    weight: Tensor = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _value_norms(model: nn.Module, attention: Attention) -> Tensor:
    rows = _rows(model.get_submodule(attention.value))
    if attention.interleaved:
        return rows.unflatten(0, (attention.heads, 3, -1))[:, 2].flatten(1).norm(dim=1)
    # Where one layer makes keys and values too, the values come last.
    rows = rows[-attention.kv_heads * attention.head_dim :]
    return rows.unflatten(0, (attention.kv_heads, -1)).flatten(1).norm(dim=1)


def _unit_norms(model: nn.Module, attention: Attention) -> Tensor:
    columns = _rows(model.get_submodule(attention.output)).t()
    return columns.unflatten(0, (attention.units, -1)).flatten(1).norm(dim=1)
