"""Which channels are tied to which: torch-pruning's dependency graph, read once."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from ray_nascomp.errors import UntraceableModelError
from ray_nascomp.model_spec import GroupSpec
from ray_nascomp.tasks.calling import call, main_output, map_tensors

TRACE_SECONDS = 120
"""Time limit of one trace; some models (grouped-query attention) hang torch-pruning."""

_PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
InGroups = dict[str, tuple[tuple[str, int], ...]]


def dependency_graph(model: nn.Module, example_inputs: Any) -> tp.DependencyGraph:
    """torch-pruning's dependency graph of the model.

    Raises:
        UntraceableModelError: If the model cannot be traced, or not within `TRACE_SECONDS`.
    """
    # torch-pruning follows the autograd graph, so every parameter must take part in it.
    stand_ins = _stand_in_for_recurrent_layers(model)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with _time_limit(TRACE_SECONDS), torch.enable_grad():
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs=map_tensors(example_inputs, lambda tensor: tensor[:2]),
                output_transform=main_output,
                verbose=False,
            )
    except Exception as error:
        raise UntraceableModelError(
            f"{type(model).__name__} cannot be traced by torch-pruning ({type(error).__name__}: {error}); its channels "
            "cannot be pruned. Models have to be plain modules whose output depends on all layers."
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for name, layer in stand_ins.items():
            replace_module(model, name, layer)


def build_graph(model: nn.Module, example_inputs: Any) -> tuple[tuple[GroupSpec, ...], dict[str, str], InGroups]:
    """The model's groups of tied channels.

    Returns:
        The groups in the model's order; layer name -> its group; layer name -> pairs
        (group, input channels for each channel of the group).

    Raises:
        UntraceableModelError: If the model cannot be traced.
    """
    names = {module: name for name, module in model.named_modules()}
    order = {name: index for index, name in enumerate(names.values())}
    tied = modules_with_tied_weights(model)
    graph = dependency_graph(model, example_inputs)
    groups: list[GroupSpec] = []
    out_groups: dict[str, str] = {}
    in_groups: dict[str, list[tuple[str, int]]] = {}
    for members in graph.get_all_groups(root_module_types=list(_PRODUCERS)):
        width = len(members[0].idxs)
        producers: list[str] = []
        regular = True
        consumers: dict[str, int] = {}
        others: dict[str, int] = {}
        for dependency, indices in members:
            name = names.get(dependency.target.module)
            module = dependency.target.module
            # Bare parameters and recurrent layers are not resized.
            regular = regular and not isinstance(module, (nn.Parameter, _RecurrentStandIn)) and module not in tied
            if name is None:
                continue
            pruner = graph.get_pruner_of_module(module)
            depthwise = isinstance(module, _CONVOLUTIONS) and module.groups > 1 and module.groups == module.out_channels
            if isinstance(module, _CONVOLUTIONS) and module.groups > 1 and not depthwise:
                regular = False
            if dependency.handler == pruner.prune_in_channels and not depthwise and isinstance(module, _PRODUCERS):
                consumers[name] = consumers.get(name, 0) + len(indices)
            elif isinstance(module, _PRODUCERS):
                producers.append(name)
                regular = regular and len(indices) == width
            elif any(parameter.numel() > 1 for parameter in module.parameters(recurse=False)):
                others[name] = others.get(name, 0) + len(indices)
        producers = sorted(set(producers), key=order.__getitem__)
        root = producers[0]
        followers = consumers | others
        regular = regular and all(count % width == 0 for count in followers.values())
        for name in producers:
            out_groups[name] = root
        for name, count in followers.items():
            in_groups.setdefault(name, []).append((root, count // width))
        prunable = regular and bool(consumers) and width > 1
        groups.append(GroupSpec(root, width, tuple(producers), prunable))
    groups.sort(key=lambda group: order[group.name])
    groups = _keep_removable(model, example_inputs, groups)
    return tuple(groups), out_groups, {name: tuple(pairs) for name, pairs in in_groups.items()}


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def modules_with_tied_weights(model: nn.Module) -> set[nn.Module]:
    """Modules that share a parameter with another; torch-pruning would take them apart."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def remove_channels(model: nn.Module, example_inputs: Any, removed: dict[str, list[int]]) -> None:
    """Removes output channels, and all that is tied to them, in place.

    Args:
        model: The model to make smaller.
        example_inputs: Inputs to trace it with.
        removed: Name of any layer of a group -> indices of its channels to remove.

    Raises:
        UntraceableModelError: If the model cannot be traced.
    """
    removed = {name: indices for name, indices in removed.items() if indices}
    if not removed:
        return
    modules = dict(model.named_modules())
    training = model.training
    model.eval()
    graph = dependency_graph(model, example_inputs)
    for name, indices in removed.items():
        module = modules[name]
        pruner = graph.get_pruner_of_module(module)
        graph.get_pruning_group(module, pruner.prune_out_channels, idxs=sorted(indices)).prune()
    model.train(training)


def _keep_removable(model: nn.Module, example_inputs: Any, groups: list[GroupSpec]) -> list[GroupSpec]:
    """The groups, with those unprunable from which one channel cannot be removed.

    A view into heads, for example, fails with one channel less.
    """
    candidates = [group.name for group in groups if group.prunable]
    if not candidates or _runs_without(model, example_inputs, candidates):
        return groups
    removable = {name for name in candidates if _runs_without(model, example_inputs, [name])}
    return [GroupSpec(g.name, g.width, g.layers, g.name in removable) for g in groups]


def _runs_without(model: nn.Module, example_inputs: Any, names: list[str]) -> bool:
    smaller = copy.deepcopy(model)
    try:
        with torch.no_grad():
            expected = call(model, example_inputs).shape
            remove_channels(smaller, example_inputs, {name: [0] for name in names})
            return call(smaller, example_inputs).shape == expected
    except Exception:  # Whatever a model says to a channel less, it cannot do without it.
        return False


class _RecurrentStandIn(nn.Module):
    """A matrix product in place of a recurrent layer, whose autograd graph torch-pruning cannot follow."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.directions = 2 if layer.bidirectional else 1
        self.layers = layer.num_layers
        self.hidden = layer.proj_size or layer.hidden_size
        self.batch_first = layer.batch_first
        self.has_cell = isinstance(layer, nn.LSTM)
        self.mix = nn.Parameter(torch.ones(layer.input_size, self.hidden * self.directions))

    def forward(self, inputs: torch.Tensor, _state: Any = None) -> tuple[torch.Tensor, Any]:
        """Outputs and last state, shaped as the recurrent layer's."""
        outputs = inputs @ self.mix
        last = outputs.mean(1 if self.batch_first else 0)[:, : self.hidden]
        state = last.expand(self.layers * self.directions, *last.shape)
        return outputs, (state, state) if self.has_cell else state


def _stand_in_for_recurrent_layers(model: nn.Module) -> dict[str, nn.RNNBase]:
    """Replaces recurrent layers; returns the originals by name."""
    originals = {name: module for name, module in model.named_modules() if isinstance(module, nn.RNNBase) and name}
    for name, module in originals.items():
        replace_module(model, name, _RecurrentStandIn(module))
    return originals


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after some seconds; only in a main thread, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
