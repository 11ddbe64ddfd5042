"""What reaches layers on calibration data, padding left out: ranges, covariances, samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.compression.patches import CONVOLUTIONS, parts_and_width, patch_window, sample_patches
from ray_nascomp.tasks.calling import call

_SAMPLED_ROWS = 512
_PATCHES = 8192
"""Patches that are observed of a convolution, over all batches: neighbours hardly differ."""
_MEMORY = 256 * 2**20
"""Bytes of covariances or samples that are held at a time."""


@dataclass
class ObservedInput:
    """The input that one layer, or several of them, read: a linear layer's features, a convolution's patches.

    Attributes:
        layers: Names of the layers, in the order in which they run.
        lowest: Least value of each feature, shape `(features,)`; of patches that of the whole input.
        highest: Largest value of each feature, shape `(features,)`; of patches that of the whole input.
        covariance: Mean of x x' for each of the layer's groups, shape `(groups, features / groups,
            features / groups)`, double precision, not centred; None where it was not asked for.
        rows: Some of the inputs, shape `(rows, features)`.
        count: Number of inputs observed.
    """

    layers: list[str]
    lowest: Tensor
    highest: Tensor
    covariance: Tensor | None
    rows: Tensor
    count: int = field(default=0)

    @property
    def magnitude(self) -> Tensor:
        """Largest absolute value of each feature, shape `(features,)`."""
        return torch.maximum(self.highest, -self.lowest)

    def scaled(self, factor: Tensor) -> ObservedInput:
        """What is observed where each feature is multiplied by a positive factor, shape `(features,)`."""
        factor = factor.cpu()
        covariance = self.covariance
        if covariance is not None:
            covariance = covariance * torch.outer(factor, factor)
        return ObservedInput(
            self.layers, self.lowest * factor, self.highest * factor, covariance, self.rows * factor, self.count
        )

    def reaches(self, lowest: Tensor, highest: Tensor) -> None:
        """Takes in the ends of a range, of each feature or of all of them."""
        self.lowest = torch.minimum(self.lowest, lowest)
        self.highest = torch.maximum(self.highest, highest)

    def add(self, inputs: Tensor, generator: torch.Generator) -> None:
        """Takes in inputs of shape `(rows, features)`."""
        if not len(inputs):
            return
        self.reaches(inputs.amin(0), inputs.amax(0))
        total = self.count + len(inputs)
        if self.covariance is not None:
            by_group = inputs.unflatten(1, (len(self.covariance), -1)).transpose(0, 1)
            self.covariance.mul_(self.count / total).add_(by_group.transpose(1, 2) @ by_group, alpha=1 / total)
        # Every input seen so far stays in the sample with the same probability.
        share = torch.rand(len(inputs), generator=generator) < _SAMPLED_ROWS / total
        if total <= _SAMPLED_ROWS:
            self.rows = torch.cat([self.rows, inputs])
        elif share.any():
            candidates = torch.cat([self.rows, inputs[share]])
            self.rows = candidates[torch.randperm(len(candidates), generator=generator)[:_SAMPLED_ROWS]]
        self.count = total


def shared_inputs(network: nn.Module, layers: Iterable[str], inputs: Any) -> list[list[str]]:
    """The layers in the order in which they run, those that read the same features together.

    Args:
        network: The network; run once, as it is.
        layers: Names of linear layers and convolutions.
        inputs: A batch's inputs.
    """
    groups: dict[tuple[int, str], list[str]] = {}
    alive: list[Tensor] = []  # An id is unique among tensors that are alive.

    def note(module: nn.Module, arguments: tuple[Tensor, ...], name: str) -> None:
        alive.append(arguments[0])
        window = patch_window(module) if isinstance(module, CONVOLUTIONS) else ""
        groups.setdefault((id(arguments[0]), window), []).append(name)

    handles = [network.get_submodule(name).register_forward_pre_hook(partial(note, name=name)) for name in layers]
    try:
        with torch.no_grad():
            call(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found: list[list[str]] = []
    seen: set[str] = set()
    for names in groups.values():
        fresh = [name for name in dict.fromkeys(names) if name not in seen]
        seen.update(fresh)
        if fresh:
            found.append(fresh)
    return found


def observe_inputs(
    network: nn.Module,
    groups: Iterable[Sequence[str]],
    batches: Sequence[Any],
    with_covariance: bool = True,
    seed: int = 0,
) -> Iterator[ObservedInput]:
    """What each group of layers reads, one group after the other.

    The network runs over the data once for as many groups as fit in 256 MB, so
    that a caller who changes a layer sees later ones fed by the changed one.

    Args:
        network: The network; run in the mode it is in.
        groups: Names of the layers that share an input, from `shared_inputs`.
        batches: Inputs of the calibration batches. Where they are dicts with an `attention_mask`
            of shape `(batch, length)`, positions that it leaves out are not observed.
        with_covariance: Whether covariances are wanted, which take longer than all the rest.
        seed: Of the choice of sampled rows and patches.
    """
    pending = list(groups)
    generator = torch.Generator().manual_seed(seed)
    while pending:
        observed: list[ObservedInput] = []
        used = 0
        while pending and (not observed or used < _MEMORY):
            group = list(pending.pop(0))
            parts, width = parts_and_width(network.get_submodule(group[0]))
            features = parts * width
            used += _bytes_of(network, group, with_covariance)
            observed.append(
                ObservedInput(
                    group,
                    torch.full((features,), torch.inf),
                    torch.full((features,), -torch.inf),
                    torch.zeros(parts, width, width, dtype=torch.float64) if with_covariance else None,
                    torch.zeros(0, features),
                )
            )
        _run(network, observed, batches, generator)
        yield from observed


def are_seen_at_once(network: nn.Module, groups: Sequence[Sequence[str]]) -> bool:
    """Whether `observe_inputs` sees all of the groups before its caller has changed a layer, with covariances."""
    return sum(_bytes_of(network, group, True) for group in groups[:-1]) < _MEMORY


def _bytes_of(network: nn.Module, group: Sequence[str], with_covariance: bool) -> int:
    parts, width = parts_and_width(network.get_submodule(group[0]))
    return 8 * parts * width**2 if with_covariance else 4 * parts * width * _SAMPLED_ROWS


def _run(network: nn.Module, observed: list[ObservedInput], batches: Sequence[Any], generator: torch.Generator) -> None:
    mask: Tensor | None = None

    def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor, into: ObservedInput) -> None:
        inputs = arguments[0].detach().float().cpu()
        if isinstance(module, CONVOLUTIONS):
            count = max(1, _PATCHES // len(batches))
            into.add(sample_patches(module, inputs, output.shape, count, generator), generator)
            into.reaches(inputs.amin(), inputs.amax())
        else:
            into.add(_rows(inputs, mask), generator)

    handles = [
        network.get_submodule(entry.layers[0]).register_forward_hook(partial(note, into=entry)) for entry in observed
    ]
    try:
        with torch.no_grad():
            for inputs in batches:
                mask = _mask_of(inputs)
                call(network, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _mask_of(inputs: Any) -> Tensor | None:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool().cpu() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and inputs.ndim == 3 and inputs.shape[:2] == mask.shape:
        return inputs[mask]
    return inputs.flatten(0, -2)
