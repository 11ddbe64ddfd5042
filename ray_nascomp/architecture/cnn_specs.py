"""What sub-networks of a convolutional network are made of, without building them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray_nascomp.architecture.specs import spec_without
from ray_nascomp.model_spec import LayerSpec, ModelSpec

RESOLUTION = "resolution"
"""Name of the dimension of the images' size."""


@dataclass(frozen=True)
class Part:
    """Something whose dimensions stand together: a block that can be left out, or a layer outside of such.

    Attributes:
        name: Name of the block or the layer.
        groups: Group of channels that only layers of this part produce -> its width.
        kernels: Convolution whose kernel can be cropped -> its sizes, ascending, its own last.
        is_block: Whether it can be left out.
    """

    name: str
    groups: Mapping[str, int]
    kernels: Mapping[str, tuple[int, ...]]
    is_block: bool = False


@dataclass(frozen=True)
class Reduction:
    """What an architecture takes away from the whole network.

    Attributes:
        units: Group -> number of channels that go.
        kernels: Convolution -> size of its kernel.
        blocks: Names of the blocks that are left out.
    """

    units: Mapping[str, int]
    kernels: Mapping[str, int]
    blocks: frozenset[str]

    @classmethod
    def of(cls, parts: tuple[Part, ...], architecture: Mapping[str, Any]) -> Reduction:
        """What an architecture takes away; missing values leave everything as it is."""
        units: dict[str, int] = {}
        kernels: dict[str, int] = {}
        blocks = set()
        for part in parts:
            values = architecture.get(part.name, {})
            if not values.get("keep", True):
                blocks.add(part.name)
                continue
            for group, width in part.groups.items():
                units[group] = width - kept_channels(values.get("width", 1.0), width)
            for layer, sizes in part.kernels.items():
                kernels[layer] = max(size for size in sizes if size <= max(sizes[0], values.get("kernel", sizes[-1])))
        return cls(units, kernels, frozenset(blocks))


@dataclass(frozen=True)
class CNNSpecs:
    """Structures of sub-networks, from those of the whole network; holds no weights.

    Attributes:
        wholes: Size of the images -> the whole network's structure; None stands for their own size.
        parts: The parts that can be reduced.
    """

    wholes: Mapping[int | None, ModelSpec]
    parts: tuple[Part, ...]

    def __call__(self, architecture: Mapping[str, Any]) -> ModelSpec:
        """The structure that tracing the architecture's network would find."""
        size = architecture.get(RESOLUTION)
        whole = self.wholes[size if size in self.wholes else None]
        reduction = Reduction.of(self.parts, architecture)
        dropped = tuple(f"{name}." for name in sorted(reduction.blocks))
        spec = spec_without(whole, reduction.units, dropped)
        return replace(spec, layers=tuple(_with_kernel(layer, reduction.kernels) for layer in spec.layers))


def kept_channels(share: float, width: int) -> int:
    """Channels that a share leaves of `width`: a multiple of 8 where it is 8 or more, at least 2."""
    if share >= 1:
        return width
    count = share * width
    return min(width, max(2, 8 * round(count / 8) if count >= 8 else round(count)))


def _with_kernel(layer: LayerSpec, kernels: Mapping[str, int]) -> LayerSpec:
    if layer.name not in kernels:
        return layer
    shape = (*layer.weight_shape[:2], *(kernels[layer.name],) * len(layer.weight_shape[2:]))
    return replace(layer, weight_shape=shape)
