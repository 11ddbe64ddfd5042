"""What a case study is made of: data, a network, what can be changed of it, limits and a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baseline import Augment, Inputs, Split, joined, rows_of
from torch import nn

import ray_nascomp as nc


@dataclass(frozen=True)
class Splits:
    """The samples of a case, each an (inputs, targets) pair."""

    train: Split
    val: Split
    test: Split

    def first(self, train: int | None, val: int | None, test: int | None) -> Splits:
        """The first samples of each; None for all."""
        parts = ((self.train, train), (self.val, val), (self.test, test))
        return Splits(*(_rows(part, slice(count)) for part, count in parts))

    def fold(self, number: int) -> Splits:
        """The same samples split otherwise, into as many of each; no two folds test on the same one.

        Args:
            number: Which of the folds; 0 is this split, and after the last one comes 0 again.
        """
        every = joined([self.test, self.val, self.train])
        count, tested, held_out = len(every[1]), len(self.test[1]), len(self.test[1]) + len(self.val[1])
        first = number % (count // tested) * tested
        turned = joined([_rows(every, slice(first, None)), _rows(every, slice(first))])
        return Splits(
            train=_rows(turned, slice(held_out, None)),
            val=_rows(turned, slice(tested, held_out)),
            test=_rows(turned, slice(tested)),
        )


def _rows(split: Split, rows: slice) -> Split:
    inputs, targets = split
    return rows_of(inputs, rows), targets[rows]


@dataclass(frozen=True)
class Limits:
    """What a smaller form has to keep to.

    Attributes:
        params: Largest share of the original's parameters.
        size: Largest share of the original file's bytes.
        speedup: Smallest speedup at batch size 1, one thread.
        drop: Largest loss of validation accuracy within the search.
        equal: So much validation accuracy tells no two models apart that are trained to the end; the smaller and
            faster one is taken, by the product of how many times it is smaller and how many times faster.
    """

    params: float
    size: float
    speedup: float
    drop: float
    equal: float


@dataclass(frozen=True)
class Budget:
    """How much a study may spend.

    Attributes:
        samples: So many samples of each split are used; None for all.
        epochs: Epochs of the original's training.
        learning_rate: Peak learning rate of that.
        trials: Trials of the search.
        trial_epochs: Epochs of a trial.
        trial_samples: Training samples that trials use; None for all.
        copies: How often trials see each sample in an epoch, all but one of them augmented.
        final_epochs: Epochs of the chosen models' training, on all samples.
        final_copies: The same as `copies`, for the chosen models.
        variants: How many of a search's best results are trained to the end; validation data decide among them.
        limits: What the chosen model has to keep to.
        minutes: After so many on two cores the search ends, whatever trials are left; None for no such limit. One
            core has twice as many.
        unlabelled: So many samples without a class the chosen models see besides in an epoch.
    """

    samples: int | None
    epochs: int
    learning_rate: float
    trials: int
    trial_epochs: int
    trial_samples: int | None
    copies: int
    final_epochs: int
    final_copies: int
    variants: int
    limits: Limits
    minutes: float | None = None
    unlabelled: int = 0


@dataclass(frozen=True)
class Case:
    """A case study: data, a network, and what can be changed of it.

    Attributes:
        name: Its name.
        load: Function from a path to the data.
        build: Function from an architecture to a network.
        original: The architecture of the original.
        architecture: Dimensions of the architecture.
        augment: Function (inputs, generator) -> other inputs of the same classes, if there is one.
        batch_size: Samples a training step.
        budget: What `make case-NAME` spends.
        quick: What its `--quick` spends.
        augments_original: Whether the original's training changes its samples, too.
        start: Function (original, splits, path to the data) -> the task that is searched, with all training
            samples; None for the original itself with the builder and the architecture above.
        space: Function from that task to what is searched; None for sparsities by group, and ranks and bits by layer.
        first: Function from that task to configs that all searches begin with.
        cross_validates: Whether each seed tests on another fold of the samples, which have no test set of their own.
        unlabelled: Function (count) -> inputs without classes, if there are any: the teacher alone speaks of them.
        quality: What a search wants besides speed and few bytes. Where validation samples are few and all results
            learn from the original, the divergence from it tells more of them apart than accuracy does.
    """

    name: str
    load: Callable[[Path], Splits]
    build: Callable[[dict[str, Any]], nn.Module]
    original: Mapping[str, Any]
    architecture: Mapping[str, Any]
    augment: Augment | None
    batch_size: int
    budget: Budget
    quick: Budget
    augments_original: bool = True
    cross_validates: bool = False
    start: Callable[[nn.Module, Splits, Path], nc.Task] | None = None
    space: Callable[[nc.Task], dict[str, Any]] | None = None
    first: Callable[[nc.Task], list[dict[str, Any]]] | None = None
    unlabelled: Callable[[int], Inputs] | None = None
    quality: nc.Objective = field(default_factory=lambda: nc.Objective("accuracy"))
