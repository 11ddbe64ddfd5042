"""A supernet: one network's weights trained so that every sub-network of a space works with them.

Each step trains the largest, the smallest and some random sub-networks, the others with the
largest one's outputs as targets: the sandwich rule and in-place distillation of Yu and Huang
(2019, arXiv 1903.05134).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ray_nascomp.architecture.saved_supernet import load_supernet, save_supernet
from ray_nascomp.architecture.shared_weights import SharedNetwork, SharedWeights, rebased
from ray_nascomp.compression.batch_norm import reestimate_batch_norm
from ray_nascomp.compression.distill import distillation_loss
from ray_nascomp.errors import ConfigError, NonFiniteModelError
from ray_nascomp.space import Space
from ray_nascomp.space.dimensions import Dimension
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import call, device_of, map_tensors
from ray_nascomp.tasks.data import Batch

AnyTask = TypeVar("AnyTask", bound=Task)
_MAX_GRADIENT_NORM = 5.0
_WARMUP_SHARE = 0.1
_KEPT_NETWORKS = 256


def train_supernet(
    task: AnyTask,
    *,
    epochs: int,
    sub_networks: int = 2,
    lr: float | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> AnyTask:
    """Trains a task's model so that all architectures of its space work with its weights.

    Trials then start from weights that fit their sub-network, instead of slices of a network that
    was trained as a whole. When that pays is told in its guide (docs/guides/supernet.md).

    Args:
        task: A task with an architecture space, all of whose networks are parts of its model:
            `HuggingFaceTask.elastic`, or a builder of one's own.
        epochs: Passes over the training data. A step takes as long as one of each of its
            sub-networks: about three steps of the whole model.
        sub_networks: Random sub-networks a step, beside the largest and the smallest.
        lr: Peak learning rate of AdamW; the (geometric) middle of the task's range if absent.
        seed: Order of the batches, choice of sub-networks, dropout.
        folder: Where the supernet is kept. One of the same task and the same arguments that is
            there already is loaded instead of trained.
        show_progress: Whether a bar is drawn on stderr.

    Returns:
        A task whose model and architectures have the supernet's weights. Results stay relative to
        the model that was given (the new task's `original`), teachers are the new one.

    Raises:
        ConfigError: If the task has no architecture space, an architecture is no part of the model,
            an argument is out of its range, or the folder holds another supernet.
        NonFiniteModelError: If the training diverges.
    """
    if task.build is None:
        raise ConfigError("task: it has no architecture to search; give it `build` and `architecture`, or `elastic()`")
    for name, count, least in (("epochs", epochs, 1), ("sub_networks", sub_networks, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ConfigError(f"{name}: {count!r} was given, a whole number of {least} or more is allowed")
    if lr is not None and not 0 < lr < math.inf:
        raise ConfigError(f"lr: {lr!r} was given, a positive number is allowed")
    rate = lr if lr is not None else math.sqrt(math.prod(task.learning_rates))
    space = Space({"architecture": task.architecture})
    settings = {
        "task": task.fingerprint,
        "space": space.to_dict(),
        "epochs": epochs,
        "sub_networks": sub_networks,
        "lr": rate,
        "seed": seed,
        "batch_size": task.batch_size,
    }
    ranking: Mapping[str, list[int]] | None = getattr(task.build, "ranking", None)
    saved = load_supernet(Path(folder), settings) if folder is not None else None
    model = copy.deepcopy(task.model)
    if saved is None:
        trained, losses = _train(task, space, epochs, sub_networks, rate, seed, show_progress)
        model.load_state_dict(trained.state_dict())
        if folder is not None:
            save_supernet(Path(folder), model, settings, losses, ranking or {})
    else:
        model.load_state_dict(saved.weights)
        # Importance that was measured anew may order alike heads otherwise than the training did.
        ranking = saved.ranking
    build: Any = task.build
    if getattr(build, "inherits", False):
        build = rebased(build, model) if not ranking else build.with_model(model, ranking)
    return task.with_changes(model=model, build=build, original=task.original or task)


def _train(
    task: Task, space: Space, epochs: int, sub_networks: int, rate: float, seed: int, show_progress: bool
) -> tuple[nn.Module, list[tuple[float, float]]]:
    """The trained network, and each epoch's mean loss of the largest and of the smallest."""
    network = copy.deepcopy(task.model)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    shared = SharedWeights(network, task.build)
    shared.check(_extreme(space, min, np.random.default_rng(seed)), task.model)

    @lru_cache(maxsize=_KEPT_NETWORKS)
    def sub_network(key: str) -> SharedNetwork:
        return shared.network(json.loads(key))

    optimizer = torch.optim.AdamW(network.parameters(), rate)
    steps = epochs * -(-len(task.train_data) // task.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=_WARMUP_SHARE, cycle_momentum=False
    )
    rng = np.random.default_rng(seed)
    history: list[tuple[float, float]] = []
    console = Console(stderr=True)
    with torch.random.fork_rng(), Progress(console=console, disable=not show_progress) as progress:
        torch.manual_seed(seed)
        bar = progress.add_task("supernet", total=steps)
        for epoch in range(epochs):
            losses: list[tuple[float, float]] = []
            for batch in task.train_batches((seed + epoch) % 2**31):
                if len(batch[1]) > 1 or not losses:  # Batch normalisation cannot train on a single sample.
                    chosen = [_extreme(space, max, rng), _extreme(space, min, rng)]
                    chosen += [space.sample(rng)["architecture"] for _ in range(sub_networks)]
                    networks = [sub_network(json.dumps(architecture)) for architecture in chosen]
                    optimizer.zero_grad()
                    losses.append(_sandwich(task, networks, batch, device_of(network)))
                    nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRADIENT_NORM)
                    optimizer.step()
                schedule.step()
                largest, smallest = np.mean(losses, axis=0)
                told = f"supernet: loss {largest:.3f} of the largest, {smallest:.3f} of the smallest"
                progress.update(bar, advance=1, description=told)
            history.append((float(largest), float(smallest)))
            if not np.isfinite(history[-1]).all():
                raise NonFiniteModelError(f"the supernet's training diverged in epoch {epoch + 1}; try a lower lr")
    reestimate_batch_norm(network, task.calibration_batches())
    return network, history


def _sandwich(task: Task, networks: list[SharedNetwork], batch: Batch, device: torch.device) -> tuple[float, float]:
    """Adds the gradients of one step; the task's loss of the first network and of the second."""
    inputs = map_tensors(batch[0], lambda tensor: tensor.to(device))
    targets = batch[1].to(device)
    seen = []
    teacher: Tensor | None = None
    for network in networks:
        outputs = call(network, inputs)
        loss = task.loss(outputs, targets)
        seen.append(loss.item())
        if teacher is not None:
            loss = distillation_loss(outputs, teacher, targets)
        (loss / len(networks)).backward()  # A mean, so that clipping does not depend on their number.
        teacher = outputs.detach() if teacher is None else teacher
    return seen[0], seen[1]


def _extreme(space: Space, choose: Callable[..., Any], rng: np.random.Generator) -> dict[str, Any]:
    """The architecture with all that has an order at its largest or smallest; the rest is drawn."""
    values = [
        _end(dimension, choose) if _is_ordered(dimension) else dimension.sample(rng) for dimension in space.dimensions
    ]
    architecture: dict[str, Any] = space.to_config(values)["architecture"]
    return architecture


def _is_ordered(dimension: Dimension) -> bool:
    return dimension.kind != "categorical" or all(
        isinstance(value, (bool, int, float)) for value in dimension.categories
    )


def _end(dimension: Dimension, choose: Callable[..., Any]) -> Any:
    return choose(dimension.levels or (dimension.lower, dimension.upper))
