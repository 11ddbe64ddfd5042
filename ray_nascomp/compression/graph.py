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
from ray_nascomp.compression.shuffles import CutGraph
from ray_nascomp.compression.stand_ins import remove_inputs, standing_in
from ray_nascomp.compression.units import PRODUCERS, Places, are_exchangeable, is_depthwise, places_in
from ray_nascomp.errors import UntraceableModelError
from ray_nascomp.model_spec import GroupSpec
from ray_nascomp.tasks.calling import call, main_output, map_tensors

TRACE_SECONDS = 120
"""Time limit of one trace, and of finding its groups; grouped queries and shuffled channels hang torch-pruning."""

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

    graph: CutGraph
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
                graph = CutGraph().build_dependency(
                    model,
                    example_inputs=map_tensors(example_inputs, lambda tensor: tensor[:2]),
                    output_transform=main_output,
                    verbose=False,
                )
        except Exception as error:
            raise UntraceableModelError(
                f"{type(model).__name__} cannot be traced by torch-pruning ({type(error).__name__}: {error})"
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
    own_names = {module: name for name, module in model.named_modules()}
    names = own_names | traced.replaced
    groups: list[GroupSpec] = []
    out_groups: dict[str, tuple[str, int]] = {}
    in_groups: dict[str, list[tuple[str, int]]] = {}
    places: dict[str, tuple[Places, ...]] = {}
    with _time_limit(TRACE_SECONDS):
        found = list(_tied_channels(traced.graph))
    for members, width in found:
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
                regular = regular and dependency.target not in traced.graph.ends
                continue
            pruner = traced.graph.get_pruner_of_module(module)
            depthwise = is_depthwise(module)
            if isinstance(module, CONVOLUTIONS) and module.groups > 1 and not depthwise:
                regular = False
            if dependency.handler == pruner.prune_in_channels and not depthwise and isinstance(module, PRODUCERS):
                consumers[name] = consumers.get(name, 0) + len(indices)
                continue
            regular = regular and dependency.target not in traced.graph.ends
            if depthwise and module.out_channels != width:
                # It follows a concatenation: its channels belong to several groups.
                others[name] = others.get(name, 0) + len(indices)
            elif isinstance(module, PRODUCERS):
                if name not in out_groups:
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
        own = places_in(members, width, own_names, traced.graph) if prunable else None
        if own is not None:
            places[root] = own
    groups.sort(key=lambda group: order[group.name])
    groups = _keep_removable(model, example_inputs, groups)
    groups = _keep_exchangeable(model, example_inputs, groups, places)
    unreached = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PRODUCERS) and module not in traced.graph.module2node and name not in inner
    ]
    return ChannelGraph(
        tuple(groups),
        out_groups,
        {name: tuple(pairs) for name, pairs in in_groups.items()},
        frozenset(name for name in unreached if not _matters(model, example_inputs, name)),
    )


def whole_graph(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """The graph of a model whose channels cannot be followed: every layer is a group that cannot be pruned.

    Args:
        model: The model.
        example_inputs: Inputs to run it with.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRODUCERS)}
    groups = tuple(GroupSpec(name, layer.weight.shape[0], (name,), False) for name, layer in layers.items())
    unused = frozenset(name for name in layers if not _matters(model, example_inputs, name))
    return ChannelGraph(groups, {name: (name, 1) for name in layers}, {}, unused)


def _tied_channels(graph: tp.DependencyGraph) -> Iterator[tuple[Any, int]]:
    """Members of each group of tied channels, and how many there are.

    A layer whose first channel is tied to others of its own, as where channels are shuffled or one half gates the
    other, is alone: no channel of it can be removed, and torch-pruning takes minutes to follow all of them.
    """
    seen: set[nn.Module] = set()
    # A depthwise convolution over several groups would make one of them.
    for module in sorted(graph.module2node, key=is_depthwise):
        if not isinstance(module, PRODUCERS) or module in seen or module in graph.IGNORED_LAYERS_IN_TRACING:
            continue
        pruner = graph.get_pruner_of_module(module)
        width = pruner.get_out_channels(module)
        first = graph.get_pruning_group(module, pruner.prune_out_channels, idxs=[0])
        own = [member for member in first if member.dep.target.module is module]
        if len(own[0].idxs) > 1:
            seen.add(module)
            yield own, width
            continue
        members = graph.get_pruning_group(module, pruner.prune_out_channels, idxs=list(range(width)))
        seen.update(dep.target.module for dep, _ in members if graph.is_out_channel_pruning_fn(dep.handler))
        yield members, width


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
    graph = _dependency_graph(model, example_inputs).graph
    found: dict[str, tuple[Places, ...]] = {}
    for group in groups:
        module = model.get_submodule(group.layers[0])
        pruner = graph.get_pruner_of_module(module)
        members = graph.get_pruning_group(module, pruner.prune_out_channels, idxs=list(range(group.width)))
        places = places_in(members, group.width, names, graph)
        if places is not None:
            found[group.name] = places
    return found


def _keep_exchangeable(
    model: nn.Module, example_inputs: Any, groups: list[GroupSpec], places: dict[str, tuple[Places, ...]]
) -> list[GroupSpec]:
    """The groups, with those unprunable whose channels are not where torch-pruning says."""
    known = {group.name: places[group.name] for group in groups if group.prunable and group.name in places}
    if not known or are_exchangeable(model, example_inputs, known.values()):
        return groups
    wrong = {name for name, own in known.items() if not are_exchangeable(model, example_inputs, [own])}
    return [replace(group, prunable=group.prunable and group.name not in wrong) for group in groups]


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
