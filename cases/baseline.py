"""Training a network from scratch, epoch by epoch, so that it goes on where it was stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.tasks.calling import call, map_tensors
from ray_nascomp.tasks.data import Data
from ray_nascomp.tasks.padding import batches_of_similar_length, without_padding

Inputs = Any
"""A tensor, or a dict of tensors."""
Split = tuple[Inputs, Tensor]
Augment = Callable[[Inputs, torch.Generator], Inputs]

_SMOOTHING = 0.05
_HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
"""Where processors multiply in bfloat16, an epoch takes little more than half the time."""


def augmented(data: Split, copies: int, augment: Augment | None, seed: int) -> Split:
    """Samples and further, augmented copies of them.

    Args:
        data: Inputs and targets.
        copies: How many of each sample in all, 1 or more.
        augment: What changes them; without it they come once.
        seed: Seed of the changes.
    """
    if augment is None or copies == 1:
        return data
    inputs, targets = data
    generator = torch.Generator().manual_seed(seed)
    return joined([data, *((augment(inputs, generator), targets) for _ in range(copies - 1))])


def joined(parts: Sequence[Split]) -> Split:
    """All samples of the parts, one after the other."""
    every = [inputs for inputs, _ in parts]
    targets = torch.cat([targets for _, targets in parts])
    if isinstance(every[0], Tensor):
        return torch.cat(every), targets
    return {name: torch.cat([inputs[name] for inputs in every]) for name in every[0]}, targets


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    """Some of the samples."""
    return map_tensors(inputs, lambda tensor: tensor[rows])


def train(
    network: nn.Module,
    data: Split,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    augment: Augment | None,
    seed: int,
    checkpoint: Path,
) -> None:
    """Trains a network in place, with AdamW, one cycle of the learning rate and label smoothing.

    Args:
        network: The network.
        data: Inputs and targets.
        epochs: Epochs in all.
        learning_rate: The peak.
        batch_size: Samples a step.
        augment: What changes a batch's inputs, if anything.
        seed: Seed of order and changes.
        checkpoint: File that is written after each epoch, and from which training goes on. Each epoch's
            loss and seconds are printed.
    """
    samples = Data(data, "data")
    network.to(memory_format=torch.channels_last)
    steps = -(-len(samples) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["epochs"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    network.train()
    for epoch in range(first, epochs):
        start, losses = time.monotonic(), []
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        for rows in batches_of_similar_length(samples, batch_size, generator):
            optimizer.zero_grad()
            inputs, targets = samples.take(rows)
            batch = without_padding(inputs)
            with torch.autocast("cpu", torch.bfloat16, enabled=_HAS_BFLOAT16):
                outputs = call(network, augment(batch, generator) if augment else batch)
            flat = outputs.float().flatten(0, -2)
            loss = nn.functional.cross_entropy(flat, targets.flatten(), label_smoothing=_SMOOTHING)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            schedule.step()
        written = checkpoint.with_suffix(".part")
        torch.save({"epochs": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}, written)
        os.replace(written, checkpoint)
        seconds, mean = time.monotonic() - start, sum(losses) / steps
        print(f"original, epoch {epoch + 1} of {epochs}: loss {mean:.3f}, {seconds:.0f} s", flush=True)
    network.to(memory_format=torch.contiguous_format)
    network.eval()
