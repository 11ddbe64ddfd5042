"""NNI's layer-wise distillers as a further loss: hidden layers learn from those of the task's own model.

- dynamic: each layer follows whichever of the teacher's layers of its shape it is nearest to.
- adaptive1d: each layer follows its namesake, through a learned linear map where channels are
  fewer (FitNets' regressor, Romero et al. 2015, arXiv 1412.6550).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from nni.compression import distillation
from torch import Tensor, nn

from ray_nascomp.errors import ConfigError, InfeasibleError
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import main_output

LAYERWISE_METHODS = ("dynamic", "adaptive1d")

_DEPTHS = 4
"""At how many depths layers are compared, where none are named."""

_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm2d, nn.BatchNorm3d)


class LayerwiseDistillation:
    """NNI's distiller between a network and the task's own model, from hooking to unhooking.

    Each layer's loss is a mean squared error over the mean square of what the teacher has there, so
    that layers count alike whatever their scale. A convolution is compared behind its batch
    normalisation, folded or not.

    Args:
        student: The network; hooks are added, nothing else is changed.
        task: The teacher is its model.
        method: One of `LAYERWISE_METHODS`.
        seed: First weights of the linear maps.
        layers: Names of the student's layers; at most four at even depths if absent. "dynamic"
            compares them with these layers of the teacher.

    Raises:
        ConfigError: For an unknown method, or named layers that cannot be compared.
        InfeasibleError: If no layer of the student can be compared with one of the teacher.
    """

    def __init__(
        self, student: nn.Module, task: Task, method: str, seed: int, layers: Sequence[str] | None = None
    ) -> None:
        if method not in LAYERWISE_METHODS:
            raise ConfigError.unknown("finetune.distill.layers", method, LAYERWISE_METHODS)
        self._task = task
        first = _channels_first(student) | _channels_first(task.model)
        names = layers or _hidden_layers(task)
        ours, theirs = (layer_outputs(model, task, names, first) for model in (student, task.model))
        links = _links(ours, theirs, method)
        if layers is not None and set(links) != set(layers):
            raise ConfigError(f"layers: {sorted(set(layers) - set(links))} have no counterpart in the task's model")
        if not links:
            raise InfeasibleError(f"no layer has the shape that it has in the task's model, which {method!r} compares")
        config = relative_entries(links if layers else _spread(links), theirs, 1.0)
        distiller = _HookedDynamic if method == "dynamic" else _HookedAdaptive1d
        self._distiller: Any = distiller(first, student, config, None, task.model, lambda _batch, model: model)
        if isinstance(self._distiller, _HookedAdaptive1d):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                for model in (student, task.model):
                    _run(model, task)
                self._distiller._register_trans_linear()

    def parameters(self) -> list[nn.Parameter]:
        """The linear maps' parameters, which are to be trained with the network's."""
        maps = getattr(self._distiller, "trans_linears", {})
        linears = [linear for targets in maps.values() for linear in targets.values() if linear is not None]
        return [parameter for linear in linears for parameter in linear.parameters()]

    def loss(self, inputs: Any) -> Tensor:
        """The loss of the batch that the student has just been run on.

        Args:
            inputs: The batch's inputs, without what the student's may have of noise.

        Returns:
            A scalar tensor; a student whose layers give zeros has about 1.
        """
        self._task.predict(self._task.model)(inputs)
        return self._distiller.compute_distill_loss()

    def close(self) -> None:
        """Removes the hooks from student and teacher."""
        self._distiller.unwrap_model()
        self._distiller.unwrap_teacher_model()


def relative_entries(
    links: Mapping[str, Sequence[str]], teacher_outputs: Mapping[str, Tensor], weight: float
) -> list[dict[str, Any]]:
    """NNI's config for layers that are compared relative to the teacher's mean square.

    Args:
        links: Student's layer -> the teacher's layers that it may follow.
        teacher_outputs: Teacher's layer -> an output of it.
        weight: Sum of the layers' shares in the loss.
    """
    return [
        {
            "op_names": [name],
            "lambda": weight / len(links) / max(teacher_outputs[found[0]].square().mean().item(), 1e-12),
            "link": list(found),
            "apply_method": "mse",
        }
        for name, found in links.items()
    ]


def layer_outputs(
    model: nn.Module, task: Task, names: Collection[str], channels_first: Collection[str]
) -> dict[str, Tensor]:
    """Layer name -> its output for the task's example; of the layers that the model has and runs.

    Args:
        model: The model; it is run once.
        task: The task.
        names: Names of layers.
        channels_first: Names of layers whose outputs' channels are moved from the second dimension to the last.
    """
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = [
        _observe(modules[name], name in channels_first, lambda output, name=name: seen.update({name: output.detach()}))
        for name in names
        if name in modules
    ]
    _run(model, task)
    for handle in handles:
        handle.remove()
    return {name: seen[name] for name in names if name in seen}


class _Hooked:
    """Observes outputs by hooks: NNI's wrappers refuse a layer that a quantizer has wrapped already."""

    def __init__(self, channels_first: Collection[str], *arguments: Any) -> None:
        self._channels_first = channels_first
        super().__init__(*arguments)

    def wrap_model(self) -> None:
        self._handles = self._hook(self._module_wrappers)  # type: ignore[attr-defined]

    def unwrap_model(self) -> None:
        for handle in self._handles:
            handle.remove()

    def wrap_teacher_model(self) -> None:
        self._teacher_handles = self._hook(self._teacher_module_wrappers)  # type: ignore[attr-defined]

    def unwrap_teacher_model(self) -> None:
        for handle in self._teacher_handles:
            handle.remove()

    def _hook(self, wrappers: Mapping[str, Any]) -> list[Any]:
        handles = []
        for name, wrapper in wrappers.items():
            space = wrapper.distillation_target_spaces["_output_0"]
            handles.append(
                _observe(
                    wrapper.module,
                    name in self._channels_first,
                    lambda output, space=space: setattr(space, "hidden_state", output),
                )
            )
        return handles


class _HookedDynamic(_Hooked, distillation.DynamicLayerwiseDistiller):
    """NNI's distiller, observing by hooks."""


class _HookedAdaptive1d(_Hooked, distillation.Adaptive1dLayerwiseDistiller):
    """NNI's distiller, observing by hooks. It aligns the last dimension, where channels are therefore moved."""


def _observe(module: nn.Module, channels_first: bool, take: Any) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = main_output(output).float()
        take(tensor.movedim(1, -1) if channels_first else tensor)

    return module.register_forward_hook(hook)


def _channels_first(model: nn.Module) -> set[str]:
    """Names of layers, or blocks with layers, that have channels in the second dimension."""
    return {
        name
        for name, module in model.named_modules()
        if any(isinstance(part, _CHANNELS_FIRST) for part in module.modules())
    }


def _hidden_layers(task: Task) -> list[str]:
    """Names of the layers that multiply, or of the normalisations that they fold with; without the last one.

    The last layer gives the model's outputs, which have a loss of their own.
    """
    norms = {layer.folds_into: layer.name for layer in task.spec.layers if layer.folds_into is not None}
    return [norms.get(layer.name, layer.name) for layer in task.spec.compressible_layers][:-1]


def _run(model: nn.Module, task: Task) -> None:
    """Runs the model on the example in evaluation mode, and leaves its mode as it was."""
    training = model.training
    task.predict(model)(task.example_inputs)
    model.train(training)


def _links(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], method: str) -> dict[str, list[str]]:
    """Student's layer -> the teacher's layers that it is compared with, its namesake first."""
    if method == "adaptive1d":
        shared = [name for name in ours if name in theirs]
        return {name: [name] for name in shared if ours[name].shape[:-1] == theirs[name].shape[:-1]}
    links = {}
    for name, output in ours.items():
        if name in theirs and theirs[name].shape != output.shape:
            continue  # That another layer has its shape is chance.
        alike = [other for other, found in theirs.items() if found.shape == output.shape]
        if alike:
            links[name] = sorted(alike, key=lambda other: other != name)
    return links


def _spread(links: dict[str, list[str]]) -> dict[str, list[str]]:
    """At most `_DEPTHS` of the layers, at even depths."""
    names = list(links)
    count = min(_DEPTHS, len(names))
    chosen = [names[round((place + 1) * len(names) / count) - 1] for place in range(count)]
    return {name: [other for other in links[name] if other in chosen or other == links[name][0]] for name in chosen}
