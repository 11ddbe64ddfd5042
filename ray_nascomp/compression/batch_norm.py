"""Batch statistics of a network whose channels have changed, estimated anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ray_nascomp.tasks.calling import call, device_of, map_tensors


def reestimate_batch_norm(network: nn.Module, batches: Iterable[tuple[Any, Any]]) -> None:
    """Sets running means and variances to those of the batches, in place; weights stay.

    Args:
        network: The network.
        batches: Pairs (inputs, targets); batches of one sample are passed over.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [module for module in norms if module.track_running_stats]
    if not norms:
        return
    momenta = [module.momentum for module in norms]
    training = network.training
    network.eval()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # A plain average over the batches.
        module.train()
    device = device_of(network)
    with torch.no_grad():
        for inputs, targets in batches:
            if len(targets) > 1:
                call(network, map_tensors(inputs, lambda tensor: tensor.to(device)))
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    network.train(training)
