"""Which channels are tied to which: torch-pruning's dependency graph, read once."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from ray_nascomp.compression.attention import Attention
from ray_nascomp.compression.patches import CONVOLUTIONS
from ray_nascomp.compression.stand_ins import remove_inputs, standing_in
from ray_nascomp.errors import UntraceableModelError
from ray_nascomp.model_spec import GroupSpec
from ray_nascomp.tasks.calling import call, main_output, map_tensors

TRACE_SECONDS = 120
"""Time limit of one trace, and of finding its groups; grouped queries and shuffled channels hang torch-pruning."""

_PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
InGroups = dict[str, tuple[tuple[str, int], ...]]


@dataclass(frozen=True)
class ChannelGraph:
    """Which layers produce and consume which channels.

    Attributes:
        groups: The groups of tied channels.
        out_groups: Layer name -> its group and the layer's output channels for each unit of it.
        in_groups: Layer name -> pairs (group, input channels for each unit of it).
        unused: Names of the layers that the model's output does not depend on.
    """

    groups: tuple[GroupSpec, ...]
    out_groups: dict[str, tuple[str, int]]
    in_groups: InGroups
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Traced:
    """torch-pruning's graph, and the layers that other ones stood in for while it was traced."""

    graph: tp.DependencyGraph
    replaced: dict[nn.Module, str]


def _dependency_graph(model: nn.Module, example_inputs: Any) -> _Traced:
    """torch-pruning's dependency graph of the model.

    Raises:
        UntraceableModelError: If the model cannot be traced, or not within `TRACE_SECONDS`.
    """
    with standing_in(model) as replaced:
        # torch-pruning follows the autograd graph, so every parameter must take part in it.
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            with _time_limit(TRACE_SECONDS), torch.enable_grad():
                graph = tp.DependencyGraph().build_dependency(
                    model,
                    example_inputs=map_tensors(example_inputs, lambda tensor: tensor[:2]),
                    output_transform=main_output,
                    verbose=False,
                )
        except Exception as error:
            raise UntraceableModelError(
                f"{type(model).__name__} cannot be traced by torch-pruning ({type(error).__name__}: {error}); its "
                "channels cannot be pruned. Models have to be plain modules whose output depends on all layers."
            ) from error
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    return _Traced(graph, replaced)


def build_graph(model: nn.Module, example_inputs: Any, attentions: Iterable[Attention] = ()) -> ChannelGraph:
    """The model's groups of tied channels, in its order.

    Args:
        model: The model.
        example_inputs: Inputs to trace it with.
        attentions: Attentions whose queries, keys and values are not pruned channel by channel.

    Raises:
        UntraceableModelError: If the model cannot be traced.
    """
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    tied = modules_with_tied_weights(model)
    inner = {layer for attention in attentions for layer in attention.rows([0])}
    traced = _dependency_graph(model, example_inputs)
    names = {module: name for name, module in model.named_modules()} | traced.replaced
    groups: list[GroupSpec] = []
    out_groups: dict[str, tuple[str, int]] = {}
    in_groups: dict[str, list[tuple[str, int]]] = {}
    # A depthwise convolution over several groups would make one of them.
    nodes = traced.graph.module2node
    traced.graph.module2node = dict(sorted(nodes.items(), key=lambda item: _is_depthwise(item[0])))
    with _time_limit(TRACE_SECONDS):
        found = list(traced.graph.get_all_groups(root_module_types=list(_PRODUCERS)))
    for members in found:
        width = len(members[0].idxs)
        producers: list[str] = []
        regular = True
        consumers: dict[str, int] = {}
        others: dict[str, int] = {}
        for dependency, indices in members:
            module = dependency.target.module
            name = names.get(module)
            # Bare parameters are not resized.
            regular = regular and not isinstance(module, nn.Parameter) and module not in tied
            if name is None:
                continue
            pruner = traced.graph.get_pruner_of_module(module)
            depthwise = _is_depthwise(module)
            if isinstance(module, CONVOLUTIONS) and module.groups > 1 and not depthwise:
                regular = False
            if dependency.handler == pruner.prune_in_channels and not depthwise and isinstance(module, _PRODUCERS):
                consumers[name] = consumers.get(name, 0) + len(indices)
            elif depthwise and module.out_channels != width:
                # It follows a concatenation: its channels belong to several groups.
                others[name] = others.get(name, 0) + len(indices)
            elif isinstance(module, _PRODUCERS):
                producers.append(name)
                # Where one layer is tied to several others, each with a part of its channels, none can be cut.
                whole = len(indices) == width == module.weight.shape[0]
                regular = regular and whole and module not in traced.replaced
            elif any(parameter.numel() > 1 for parameter in module.parameters(recurse=False)):
                others[name] = others.get(name, 0) + len(indices)
        producers = sorted(set(producers), key=order.__getitem__)
        root = producers[0]
        followers = consumers | others
        regular = regular and all(count % width == 0 for count in followers.values()) and not inner & set(producers)
        for name in producers:
            out_groups[name] = (root, 1)
        for name, count in followers.items():
            in_groups.setdefault(name, []).append((root, count // width))
        prunable = regular and bool(consumers) and width > 1
        groups.append(GroupSpec(root, width, tuple(producers), prunable))
    groups.sort(key=lambda group: order[group.name])
    groups = _keep_removable(model, example_inputs, groups)
    unreached = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _PRODUCERS) and module not in traced.graph.module2node and name not in inner
    ]
    return ChannelGraph(
        tuple(groups),
        out_groups,
        {name: tuple(pairs) for name, pairs in in_groups.items()},
        frozenset(name for name in unreached if not _matters(model, example_inputs, name)),
    )


def _is_depthwise(module: Any) -> bool:
    return isinstance(module, CONVOLUTIONS) and module.groups > 1 and module.groups == module.out_channels


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
    traced = _dependency_graph(model, example_inputs)
    for name, indices in removed.items():
        module = modules[name]
        pruner = traced.graph.get_pruner_of_module(module)
        group = traced.graph.get_pruning_group(module, pruner.prune_out_channels, idxs=sorted(indices))
        gone = {traced.replaced[d.target.module]: idxs for d, idxs in group if d.target.module in traced.replaced}
        group.prune()
        for layer, inputs in gone.items():
            remove_inputs(modules[layer], inputs)
    model.train(training)


@dataclass(frozen=True)
class Places:
    """Where the units of a group are in a layer.

    Attributes:
        layer: Name of the layer.
        is_input: Whether they are its input channels; otherwise its outputs, or what a normalisation passes on.
        channels: The layer's channels of each unit.
    """

    layer: str
    is_input: bool
    channels: tuple[tuple[int, ...], ...]


def places_of(model: nn.Module, example_inputs: Any, groups: Iterable[GroupSpec]) -> dict[str, tuple[Places, ...]]:
    """Group -> everything that goes with its units, for groups of convolutions, linear layers and batch normalisations.

    Groups that other kinds of layers with parameters follow are left out.

    Args:
        model: The model.
        example_inputs: Inputs to trace it with.
        groups: Groups of channels.

    Raises:
        UntraceableModelError: If the model cannot be traced.
    """
    names = {module: name for name, module in model.named_modules()}
    traced = _dependency_graph(model, example_inputs)
    found: dict[str, tuple[Places, ...]] = {}
    for group in groups:
        module = model.get_submodule(group.layers[0])
        pruner = traced.graph.get_pruner_of_module(module)
        members = traced.graph.get_pruning_group(module, pruner.prune_out_channels, idxs=list(range(group.width)))
        places = []
        for member in members:
            layer = member.dep.target.module
            if isinstance(layer, nn.Module) and next(layer.parameters(recurse=False), None) is None:
                continue
            if layer not in names or not isinstance(layer, (*_PRODUCERS, nn.modules.batchnorm._BatchNorm)):
                break
            channels: list[list[int]] = [[] for _ in range(group.width)]
            for channel, unit in zip(member.idxs, member.root_idxs, strict=True):
                channels[unit].append(int(channel))
            own = traced.graph.get_pruner_of_module(layer)
            takes_inputs = isinstance(layer, _PRODUCERS) and member.dep.handler == own.prune_in_channels
            is_input = takes_inputs and not _is_depthwise(layer)
            places.append(Places(names[layer], is_input, tuple(map(tuple, channels))))
        else:
            found[group.name] = tuple(dict.fromkeys(places))
    return found


def _keep_removable(model: nn.Module, example_inputs: Any, groups: list[GroupSpec]) -> list[GroupSpec]:
    """The groups, with those unprunable from which one channel cannot be removed.

    A view into heads, for example, fails with one channel less.
    """
    candidates = [group.name for group in groups if group.prunable]
    if not candidates or _runs_without(model, example_inputs, candidates):
        return groups
    removable = {name for name in candidates if _runs_without(model, example_inputs, [name])}
    return [replace(group, prunable=group.name in removable) for group in groups]


def _runs_without(model: nn.Module, example_inputs: Any, names: list[str]) -> bool:
    smaller = copy.deepcopy(model)
    try:
        with torch.no_grad():
            expected = call(model, example_inputs).shape
            remove_channels(smaller, example_inputs, {name: [0] for name in names})
            return call(smaller, example_inputs).shape == expected
    except Exception:  # Whatever a model says to a channel less, it cannot do without it.
        return False


def _matters(model: nn.Module, example_inputs: Any, name: str) -> bool:
    """Whether another output of a layer changes that of the model."""
    with torch.no_grad():
        expected = call(model, example_inputs)
        handle = model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: -output - 1)
        try:
            return not torch.equal(call(model, example_inputs), expected)
        finally:
            handle.remove()


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
