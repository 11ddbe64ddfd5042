"""A user's data, in whatever form it comes, as batches of (inputs, targets)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from ray_nascomp.errors import ConfigError
from ray_nascomp.tasks.calling import map_tensors, tensors_of

Batch = tuple[Any, Tensor]
IGNORED = -100
"""Target of places that have none, as in torch and transformers."""
_TARGET_KEYS = ("labels", "label", "targets", "target")


class Data:
    """Samples that can be counted, shuffled and batched.

    Args:
        source: A pair (inputs, targets) of tensors (inputs may be a tuple or a dict of tensors),
            a torch Dataset with a length whose items are (inputs, target) or dicts with a
            "labels" entry, or a DataLoader over such a dataset.
        name: What the data is called in errors: "train_data".

    Raises:
        ConfigError: If it is something else, or empty.
    """

    def __init__(self, source: Any, name: str) -> None:
        self._collate: Any = default_collate
        self._tensors: tuple[Any, Tensor] | None = None
        self._dataset: Any = None
        if isinstance(source, DataLoader):
            self._collate = source.collate_fn or default_collate
            source = source.dataset
        if isinstance(source, TensorDataset) and len(source.tensors) >= 2 and self._collate is default_collate:
            *inputs, targets = source.tensors
            source = (inputs[0] if len(inputs) == 1 else tuple(inputs), targets)
        if isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[1], Tensor):
            self._tensors = (source[0], source[1])
            self._length = len(source[1])
            sizes = {name: len(tensor) for name, tensor in tensors_of(source[0]).items()}
            if any(size != self._length for size in sizes.values()):
                raise ConfigError(f"{name}: inputs of {sizes} samples were given with {self._length} targets")
        elif isinstance(source, Dataset) or (isinstance(source, Sequence) and not isinstance(source, (str, tuple))):
            try:
                self._length = len(source)  # type: ignore[arg-type]
            except TypeError:
                raise ConfigError(f"{name}: a dataset without a length was given; a map-style one is allowed") from None
            self._dataset = source
        else:
            given = type(source).__name__
            if isinstance(source, tuple):
                given = f"({', '.join(type(part).__name__ for part in source)})"
            raise ConfigError(
                f"{name}: {given} was given; allowed: a pair (inputs, targets) of tensors, "
                "a torch Dataset or a DataLoader"
            )
        if self._length == 0:
            raise ConfigError(f"{name}: it is empty; at least one sample is needed")

    def __len__(self) -> int:
        return self._length

    @property
    def is_fixed(self) -> bool:
        """Whether a sample is always the same: tensors are, a dataset may augment."""
        return self._tensors is not None

    @property
    def targets(self) -> Tensor | None:
        """All targets; None for a dataset, which tells them sample by sample."""
        return self._tensors[1] if self._tensors is not None else None

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches in order, or shuffled where a generator is given."""
        return (self.take(indices) for indices in self.index_batches(batch_size, generator))

    def index_batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """The samples' indices of `batches`."""
        order = torch.arange(self._length) if generator is None else torch.randperm(self._length, generator=generator)
        return iter(order.split(batch_size))

    def head(self, count: int) -> Batch:
        """The first samples as one batch; the last one repeated where there are too few."""
        return self.take(torch.arange(count).clamp(max=self._length - 1))

    def take(self, indices: Tensor) -> Batch:
        """The batch of these samples."""
        if self._tensors is not None:
            inputs, targets = self._tensors
            return map_tensors(inputs, lambda tensor: tensor[indices]), targets[indices]
        return _split(self._collate([self._dataset[int(i)] for i in indices]))


def refuse_other_inputs(inputs: Any, known: Any) -> None:
    """Raises a ConfigError if a model is trained on other inputs than it is judged on.

    Args:
        inputs: Inputs of training samples.
        known: Inputs of validation samples.
    """
    given, allowed = (sorted(tensors_of(each)) for each in (inputs, known))
    if given != allowed:
        raise ConfigError(
            f"train_data: the inputs {', '.join(given)} were given; allowed: {', '.join(allowed)}, as in val_data"
        )


def _split(batch: Any) -> Batch:
    if isinstance(batch, Mapping):
        for key in _TARGET_KEYS:
            if key in batch:
                return {name: value for name, value in batch.items() if name != key}, batch[key]
        raise ConfigError(f"a batch has the keys {sorted(batch)}; one of {', '.join(_TARGET_KEYS)} is needed")
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        *inputs, targets = batch
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), targets
    raise ConfigError(f"a batch is a {type(batch).__name__}; allowed: (inputs, targets), or a dict with labels")
