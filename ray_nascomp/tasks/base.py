"""A task: a model, its data, its loss and its metric. All that a trial needs to know of the user's work."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ray_nascomp import registry
from ray_nascomp.costs.file_layout import FileLayout
from ray_nascomp.errors import ConfigError, NonFiniteModelError
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.tasks.architectures import Architectures, Build
from ray_nascomp.tasks.calling import call, device_of, map_tensors, tensors_of
from ray_nascomp.tasks.data import Batch, Data, refuse_other_inputs
from ray_nascomp.tasks.known import forget_task, note_copy, note_task
from ray_nascomp.tasks.labels import (
    accuracy,
    labelled_loss,
    refuse_classes_beyond,
    refuse_odd_classes,
    refuse_unlabelled,
)
from ray_nascomp.tasks.padding import (
    batches_of_similar_length,
    ignores_padding,
    order_by_length,
    sequence_lengths,
    without_padding,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from ray_nascomp.compression.resolve import Resolver

Metric = Callable[[Tensor, Tensor], float]
_CALIBRATION_SAMPLES = 512
_SMALL_MODEL = 5_000_000
_COMPARED = 8
"""So many samples tell whether two tasks read them alike."""
_DATA = ("train_data", "val_data", "test_data", "calibration_data")
_TARGETED = ("train_data", "val_data")
_CHANGEABLE = ("model", *_DATA, "build", "architecture", "batch_size", "original")


class Task:
    """What is to be compressed, and how its quality is told.

    Args:
        model: The trained model, any `nn.Module`. It is never changed.
        train_data: Samples for fine-tuning: (inputs, targets) tensors, a Dataset or a DataLoader. Where targets are
            classes, one a sample, one of -100 has no label: only the teacher tells what it is, so it counts where a
            trial distils.
        val_data: Samples that every trial is scored on.
        test_data: Samples that no search sees; only `Results.best().evaluate()` looks at them.
        calibration_data: Samples that quantizers observe; taken from the training data if absent.
        metric: "accuracy", or a function (outputs, targets) -> float over all validation samples,
            reported under its name.
        mode: Whether more of the metric is better ("max") or less ("min").
        loss: Function (outputs, targets) -> scalar tensor; cross entropy if absent.
        build: A builder `build(architecture) -> nn.Module`, which makes architecture a part of the
            search. Weights are inherited from `model` wherever names match: the leading channels
            and the centre of larger kernels. A builder whose attribute `inherits` is true brings
            the weights itself; one with a method `specs(spec)` gives a function that tells an
            architecture's structure from that of the whole model, so that none has to be traced.
        architecture: The builder's dimensions, Tune domains by name.
        batch_size: Samples a training step.
        original: Where the model is a smaller form of another already (its vocabulary trimmed, say), a
            task with that one on the same samples: results are relative to it. Where it reads them as the model does
            (the same inputs, token for token) and is no worse by the metric, it is also the teacher.

    Attributes:
        architectures: The networks that the builder makes, and the structure of each.

    Raises:
        ConfigError: For empty data, other inputs to train on than to validate on, an unknown metric, or a builder
            without dimensions.
    """

    learning_rates: tuple[float, float] = (3e-4, 1e-2)
    """Range that a search draws learning rates from."""

    def __init__(
        self,
        model: nn.Module,
        train_data: Any,
        val_data: Any,
        *,
        test_data: Any = None,
        calibration_data: Any = None,
        metric: str | Metric = "accuracy",
        mode: Literal["max", "min"] = "max",
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        build: Build | None = None,
        architecture: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        original: Task | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model: a {type(model).__name__} was given, a torch.nn.Module is allowed")
        if metric != "accuracy" and not callable(metric):
            raise ConfigError(f"metric: {metric!r} was given; allowed: 'accuracy', or a function (outputs, targets)")
        if mode not in ("max", "min"):
            raise ConfigError.unknown("mode", mode, ("max", "min"))
        if (build is None) != (not architecture):
            raise ConfigError("build and architecture: only one was given; a builder and its dimensions go together")
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size!r} was given, a positive number is allowed")
        self.model = _plain(model)
        self.train_data = Data(train_data, "train_data")
        self.val_data = Data(val_data, "val_data")
        self.test_data = Data(test_data, "test_data") if test_data is not None else None
        self.calibration_data = Data(calibration_data, "calibration_data") if calibration_data is not None else None
        self.metric = "accuracy" if metric == "accuracy" else getattr(metric, "__name__", "metric")
        self._metric_function: Metric = accuracy if metric == "accuracy" else metric  # type: ignore[assignment]
        self.mode = mode
        self._loss = loss or nn.functional.cross_entropy
        self._check_data()
        self.build = build
        self.architecture = dict(architecture or {})
        self.batch_size = batch_size
        if original is not None and (original.metric, original.mode) != (self.metric, mode):
            raise ConfigError(
                f"original: its metric is {original.metric!r} ({original.mode}); {self.metric!r} ({mode}) is needed"
            )
        self.original = original
        self.architectures = self._architectures()
        note_task(self)

    def _check_data(self) -> None:
        refuse_other_inputs(self.example_inputs, self.val_data.head(2)[0])
        if self._loss is nn.functional.cross_entropy:
            for name in _TARGETED:
                refuse_odd_classes(getattr(self, name), name)

    def _architectures(self) -> Architectures:
        return Architectures(self.model, self.build, self.architecture, self.example_inputs)

    @cached_property
    def example_inputs(self) -> Any:
        """Inputs of two training samples."""
        return self.train_data.head(2)[0]

    @cached_property
    def spec(self) -> ModelSpec:
        """The structure of the task's own model.

        Raises:
            UntraceableModelError: If it does not run on its own inputs.
            ConfigError: If it tells fewer classes apart than there are.
        """
        spec = self.architectures.spec
        if self._loss is nn.functional.cross_entropy:
            outputs = self.predict(self.model)(self.example_inputs)
            for name in _TARGETED:
                refuse_classes_beyond(outputs, getattr(self, name), name)
        return spec

    @cached_property
    def resolver(self) -> Resolver:
        """What finds numbers that depend on the task's weights."""
        from ray_nascomp.compression.resolve import Resolver

        return Resolver(self)

    @cached_property
    def file_layout(self) -> FileLayout:
        """The model's own exported file; of a large one, which is nearly all parameters, only what its kind tells."""
        from ray_nascomp.deployment.dense import layout_of, usual_layout

        size = sum(parameter.numel() for parameter in self.model.parameters())
        return layout_of(self) if size <= _SMALL_MODEL else usual_layout(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """A text that tasks with the same weights, data sizes, metric and original share."""
        digest = hashlib.sha256(f"{self.metric} {len(self.train_data)} {len(self.val_data)}".encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if self.original is not None:
            digest.update(self.original.fingerprint.encode())
        return digest.hexdigest()[:16]

    @property
    def teacher(self) -> Task:
        """The task whose model teaches, and from whose outputs divergence is measured.

        That is the original where it reads samples as this task does and is no worse, and this task elsewhere.
        """
        return self.original if self.original is not None and self._learns_from_original else self

    @cached_property
    def _learns_from_original(self) -> bool:
        original = self.original
        if original is None or not self.reads_alike(original):
            return False
        own, other = (task.outputs(task.predict(task.model), task.val_data) for task in (self, original))
        return own[0].shape == other[0].shape and self.drop(self.score(*other), self.score(*own)) <= 0

    def reads_alike(self, other: Task) -> bool:
        """Whether another task's model takes the same inputs: as many validation samples, and the first ones equal."""
        samples = [task.val_data.head(_COMPARED)[0] for task in (self, other)]
        one, another = ([(tensor.dtype, tensor.tolist()) for tensor in tensors_of(each).values()] for each in samples)
        return len(self.val_data) == len(other.val_data) and one == another

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the model's inputs: a dict's keys, or the parameters of `forward`."""
        inputs = self.example_inputs
        if isinstance(inputs, Mapping):
            return tuple(inputs)
        count = len(inputs) if isinstance(inputs, (tuple, list)) else 1
        parameters = list(inspect.signature(self.model.forward).parameters)
        return tuple(parameters[:count]) if len(parameters) >= count else tuple(f"input_{i}" for i in range(count))

    def network(self, architecture: Mapping[str, Any]) -> nn.Module:
        """A fresh network for an architecture, with the weights that it inherits; of an empty one a copy of the model.

        Raises:
            ConfigError: For unknown or missing keys, or an architecture where there is no builder.
        """
        return self.architectures.network(architecture)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss of a batch, a scalar tensor; 0 where no sample has a label."""
        return labelled_loss(self._loss, outputs, targets)

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """One epoch of shuffled training batches."""
        return self.train_data.batches(self.batch_size, torch.Generator().manual_seed(seed))

    def epoch_indices(self, generator: torch.Generator) -> list[Tensor]:
        """Indices of one epoch's shuffled training batches; where padding can be cut off, there is little of it.

        Args:
            generator: What shuffles.
        """
        if self._ignores_padding and self.train_data.is_fixed:
            return batches_of_similar_length(self.train_data, self.batch_size, generator)
        return list(self.train_data.index_batches(self.batch_size, generator))

    def calibration_batches(self) -> Iterator[Batch]:
        """Batches for observers: calibration data, or as many training samples as it takes (512)."""
        data, indices = self._calibration_samples
        return (data.take(batch) for batch in indices.split(self.batch_size))

    def calibration_inputs(self, count: int) -> list[Any]:
        """Inputs of the first of these samples in batches of similar length, without padding.

        Args:
            count: How many samples at most.
        """
        data, indices = self._calibration_samples
        chosen = order_by_length(data, indices[:count]) if self._ignores_padding else indices[:count]
        return [self.without_padding(data.take(batch)[0]) for batch in chosen.split(self.batch_size)]

    @property
    def _calibration_samples(self) -> tuple[Data, Tensor]:
        data = self.calibration_data or self.train_data
        count = min(len(data), _CALIBRATION_SAMPLES)
        if self.calibration_data is not None:
            return data, torch.arange(count)
        return data, torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]

    def predict(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """The model as a function from a batch's inputs to outputs, in evaluation mode."""
        model.eval()
        device = device_of(model)
        # Asked now, as the answer runs the task's own model, on which a caller may put hooks later.
        prepare = without_padding if self._ignores_padding else lambda inputs: inputs

        def run(inputs: Any) -> Tensor:
            with torch.no_grad():
                return call(model, map_tensors(prepare(inputs), lambda tensor: tensor.to(device))).cpu()

        return run

    def without_padding(self, inputs: Any) -> Any:
        """A batch's inputs without columns of padding alone, where the model's outputs do not depend on these."""
        return without_padding(inputs) if self._ignores_padding else inputs

    @cached_property
    def _ignores_padding(self) -> bool:
        """Whether padding may be cut off, which one sample shows."""
        if sequence_lengths(self.example_inputs) is None:
            return False
        return ignores_padding(self.model.eval(), self.train_data if self.train_data.is_fixed else self.val_data)

    def outputs(self, predict: Callable[[Any], Tensor], data: Data) -> tuple[Tensor, Tensor]:
        """Outputs and targets of all samples, in their order; samples of one length are run together.

        Args:
            predict: Function from a batch's inputs to outputs.
            data: The samples.
        """
        order = order_by_length(data) if self._ignores_padding else torch.arange(len(data))
        outputs, targets = [], []
        for indices in order.split(max(64, self.batch_size)):
            inputs, batch_targets = data.take(indices)
            outputs.append(predict(inputs))
            targets.append(batch_targets)
        back = order.argsort()
        return torch.cat(outputs)[back], torch.cat(targets)[back]

    def evaluate(self, predict: Callable[[Any], Tensor], data: Data | None = None) -> float:
        """The metric over all samples.

        Args:
            predict: Function from a batch's inputs to outputs.
            data: What to evaluate on; the validation data if absent.

        Raises:
            NonFiniteModelError: If an output is NaN or infinite.
        """
        return self.score(*self.outputs(predict, data or self.val_data))

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric of the outputs of all samples.

        Raises:
            ConfigError: If a sample has no label.
            NonFiniteModelError: If an output is NaN or infinite.
        """
        refuse_unlabelled(targets)
        if not torch.isfinite(outputs).all():
            raise NonFiniteModelError("the model's outputs are not finite")
        value = float(self._metric_function(outputs, targets))
        if not math.isfinite(value):
            raise NonFiniteModelError(f"the metric {self.metric} is {value}")
        return value

    def drop(self, value: float, baseline: float) -> float:
        """How much worse a metric's value is than the baseline's, positive if worse."""
        return baseline - value if self.mode == "max" else value - baseline

    @property
    def worst(self) -> float:
        """The finite value that stands for a model that cannot be built."""
        return 0.0 if self.mode == "max" else 1e9

    def __getstate__(self) -> dict[str, Any]:
        # Workers never see the test set.
        own: dict[str, Any] = {"fingerprint": self.fingerprint, "registered": registry.snapshot()}
        if self.original is not None:
            own["_learns_from_original"] = self._learns_from_original
        return {**self.__dict__, "test_data": None, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What users have registered goes where their task goes.
        registry.install(state.pop("registered"))
        self.__dict__.update(state)
        note_copy(self)

    def with_changes(self, **changes: Any) -> Self:
        """A task like this one but for some attributes.

        Args:
            **changes: By name, in the forms that a task is made with: `model`, `train_data`, `val_data`,
                `test_data`, `calibration_data`, `build`, `architecture`, `batch_size`, `original`.

        Raises:
            ConfigError: For another name, or empty data.
        """
        for name in changes:
            if name not in _CHANGEABLE:
                raise ConfigError.unknown("with_changes", name, _CHANGEABLE)
        task = copy.copy(self)
        task.test_data = self.test_data  # Left behind where a task travels to workers.
        for name in list(task.__dict__):
            if isinstance(getattr(type(task), name, None), cached_property):
                del task.__dict__[name]
        for name, value in changes.items():
            is_raw = name in _DATA and value is not None and not isinstance(value, Data)
            setattr(task, name, Data(value, name) if is_raw else value)
        task._check_data()
        task.model = _plain(task.model)
        task.architectures = task._architectures()
        note_task(task)
        return task

    def trained_on(self, train_data: Any) -> Self:
        """The same task with other training samples: what is judged is the same, and so is the fingerprint.

        Args:
            train_data: The samples, in the forms that a task is made with.

        Raises:
            ConfigError: For data that are empty, or have other inputs.
        """
        task = self.with_changes(train_data=train_data)
        forget_task(task)
        vars(task)["fingerprint"] = self.fingerprint
        return task


def _plain(model: nn.Module) -> nn.Module:
    from ray_nascomp.compression.plain_layers import with_plain_weights

    return with_plain_weights(model)
