"""Graphs of networks that were exported before, to be filled with the weights of networks that are built alike.

torch.export takes seconds for a transformer, and the last report of a trial needs the graph of the
first with other weights. What comes of a template is compared with the network as every exported
file is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

_PREFIX = "model."
"""What exporters put before names of tensors: that of `OutputTensor`'s attribute."""
_MOST = 64
"""Templates that a process keeps; each takes some 100 kB."""


@dataclass(frozen=True)
class Template:
    """A graph without weights.

    Attributes:
        graph: The serialized model; tensors of the network have no content.
        sources: Name of an initializer -> name of the network's tensor that it holds, and whether transposed.
        others: Name of each tensor of the network that is not in the graph as it is -> digest of its content.
    """

    graph: bytes
    sources: dict[str, tuple[str, bool]]
    others: dict[str, str]

    @classmethod
    def of(cls, proto: onnx.ModelProto, network: nn.Module) -> Template:
        """The template of a network's graph."""
        tensors = _tensors(network)
        by_content: dict[tuple[object, ...], set[tuple[str, bool]]] = {}
        for name, array in tensors.items():
            if array.ndim == 2:
                by_content.setdefault(_content(array), set()).add((name, False))
                by_content.setdefault(_content(array.T), set()).add((name, True))
        bare = onnx.ModelProto()
        bare.CopyFrom(proto)
        del bare.graph.value_info[:]
        sources = {}
        for initializer in bare.graph.initializer:
            name = initializer.name.removeprefix(_PREFIX)
            if name in tensors:
                sources[initializer.name] = (name, False)
            elif len(initializer.dims) == 2:
                same = by_content.get(_content(numpy_helper.to_array(initializer)), set())
                if len({_address(tensors[name]) for name, _ in same}) == 1:  # Otherwise it could be either's.
                    sources[initializer.name] = min(same)
            if initializer.name in sources:
                initializer.ClearField("raw_data")
        used = {_address(tensors[name]) for name, _ in sources.values()}
        others = {name: _digest(array) for name, array in tensors.items() if _address(array) not in used}
        return cls(bare.SerializeToString(), sources, others)

    def fill(self, network: nn.Module) -> onnx.ModelProto | None:
        """The graph with a network's weights; None if it depends on tensors whose place in it is not known."""
        tensors = _tensors(network)
        if any(name not in tensors or _digest(tensors[name]) != digest for name, digest in self.others.items()):
            return None
        if any(name not in tensors for name, _ in self.sources.values()):
            return None
        proto = onnx.ModelProto.FromString(self.graph)
        for initializer in proto.graph.initializer:
            if initializer.name in self.sources:
                name, is_transposed = self.sources[initializer.name]
                array = tensors[name].T if is_transposed else tensors[name]
                initializer.CopyFrom(numpy_helper.from_array(np.asarray(array, order="C"), initializer.name))
        return proto


@dataclass(frozen=True)
class Build:
    """How a network is built, and exported.

    Attributes:
        way: How it is exported.
        structure: Its modules and their settings but for whole numbers, which pruning changes.
        shapes: Those of its tensors.
    """

    way: Hashable
    structure: str
    shapes: Hashable

    @classmethod
    def of(cls, network: nn.Module, way: Hashable) -> Build:
        """A network's."""
        lines = []
        for name, module in network.named_modules():
            lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__}")
            settings = sorted(vars(module).items())
            lines += [f"{key}={_described(value)}" for key, value in settings if _is_setting(key, value)]
        config: Any = getattr(network, "config", None)
        lines.append(config.to_json_string() if hasattr(config, "to_json_string") else "")
        # NNI leaves a layer's tensors in another order.
        shapes = tuple(sorted((name, array.shape) for name, array in _tensors(network).items()))
        return cls(way, "\n".join(lines), shapes)


class Templates:
    """Templates by how networks are built.

    Only one of the very same shapes is taken: filled with a pruned network's weights, the graph of the
    whole one is right, but its file is not byte for byte what the network's own export gives.
    """

    def __init__(self) -> None:
        self._known: dict[Build, Template] = {}

    def get(self, build: Build) -> Template | None:
        """The template of networks that are built so, if there is one."""
        return self._known.get(build)

    def fails(self, build: Build) -> None:
        """Forgets a template that does not fit."""
        self._known.pop(build, None)

    def add(self, build: Build, template: Template) -> None:
        """Keeps a template; the oldest one goes where there are too many."""
        if len(self._known) >= _MOST:
            self._known.pop(next(iter(self._known)))
        self._known[build] = template


def _is_setting(key: str, value: object) -> bool:
    if key.startswith("_") or key == "normalized_shape":
        return False
    return isinstance(value, (str, float, bool, tuple)) or (callable(value) and not isinstance(value, nn.Module))


def _described(value: object) -> str:
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)


def _tensors(network: nn.Module) -> Mapping[str, np.ndarray]:
    """Parameters and buffers by name, as numpy sees them."""
    found = {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers())}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def _address(array: np.ndarray) -> int:
    """Where an array lies: tensors that are tied lie at one place."""
    return int(array.__array_interface__["data"][0])


def _content(array: np.ndarray) -> tuple[object, ...]:
    return array.shape, _digest(array)


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes()).hexdigest()
