"""How the weights of convolutions lie in memory while a network trains on a processor."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ray_nascomp.nni_adapter.evaluator import to_device
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import call, device_of

_IMAGE_DIMENSIONS = 4

_logger = logging.getLogger(__name__)


def is_faster_channels_last(network: nn.Module, task: Task) -> bool:
    """Whether a network trains faster with channels last: on a processor, with convolutions, if it runs so.

    What calls `view` on images, as users' networks and losses may, does not; two samples tell.

    Args:
        network: The network, as it is built; nothing counts what passes through it.
        task: Samples and loss.
    """
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    if device_of(network).type != "cpu" or not any(isinstance(module, convolutions) for module in network.modules()):
        return False
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), channels_last(network, True):
            inputs, targets = to_device(task.train_data.head(2), network)
            task.loss(call(network, inputs), targets)
    except Exception as error:
        _logger.info("training with channels first, as the network does not run with channels last: %s", error)
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    return True


@contextmanager
def channels_last(network: nn.Module, enabled: bool, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Weights with channels last in memory for as long as the context lasts; then first again.

    Args:
        network: The network.
        enabled: Whether anything is done.
        optimizer: What trains it; its moments lie as the weights do, or its fused step mixes up the places.
    """
    if not enabled:
        yield
        return
    try:
        _lay(network, optimizer, torch.channels_last)
        yield
    finally:
        _lay(network, optimizer, torch.contiguous_format)


def _lay(network: nn.Module, optimizer: torch.optim.Optimizer | None, order: torch.memory_format) -> None:
    """Copies what is of images into memory of an order; where an axis has one place, strides alone tell the order."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dim() == _IMAGE_DIMENSIONS:
            tensor.data = tensor.data.clone(memory_format=order)
    for state in optimizer.state.values() if optimizer is not None else ():
        for name, moment in state.items():
            if isinstance(moment, torch.Tensor) and moment.dim() == _IMAGE_DIMENSIONS:
                state[name] = moment.clone(memory_format=order)
