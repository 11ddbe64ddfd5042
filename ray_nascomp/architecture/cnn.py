"""A trained convolutional network as a space of smaller ones that inherit its weights.

Width, depth, kernel size and resolution, after once-for-all networks (Cai et al. 2020, arXiv
1908.09791): channels are ranked by importance first, so that those that stay are the best ones;
kernels keep their centre.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from torch import Tensor, nn

from ray_nascomp.architecture.channel_importance import channels_by_magnitude, channels_by_taylor
from ray_nascomp.architecture.cnn_specs import RESOLUTION, CNNSpecs, Part, Reduction, kept_channels
from ray_nascomp.architecture.residual import crop_kernel, large_kernels, leave_out, residual_blocks
from ray_nascomp.architecture.shaping import Resize, resize_images
from ray_nascomp.architecture.slicing import remove_units
from ray_nascomp.compression.graph import places_of
from ray_nascomp.compression.units import Places
from ray_nascomp.errors import ConfigError
from ray_nascomp.model_spec import GroupSpec, ModelSpec
from ray_nascomp.space import when
from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import call, tensors_of


class ElasticCNN:
    """Builds sub-networks of a model.

    Args:
        model: The whole model.
        example_inputs: Inputs of two samples that it runs on.
        parts: Its parts that can be reduced.
        places: Group -> where its channels are.
        ranking: Group -> its channels, the most important first.
        resolutions: Sizes of images to choose from, that of the example included; empty where there
            is no choice.
    """

    inherits = True
    """Sub-networks come with their weights."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        parts: tuple[Part, ...],
        places: Mapping[str, tuple[Places, ...]],
        ranking: Mapping[str, list[int]],
        resolutions: tuple[int, ...] = (),
    ) -> None:
        self.model = model
        self.parts = parts
        self.places = dict(places)
        self.ranking = dict(ranking)
        self.resolutions = resolutions
        self._example_inputs = example_inputs

    def __call__(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The sub-network of an architecture; with everything kept it equals the model."""
        network = copy.deepcopy(self.model)
        reduction = Reduction.of(self.parts, architecture)
        removed = {
            group: self.ranking[group][len(self.ranking[group]) - count :]
            for group, count in reduction.units.items()
            if count
        }
        remove_units(network, self.places, removed)
        for layer, kernel in reduction.kernels.items():
            crop_kernel(network.get_submodule(layer), kernel)
        for block in reduction.blocks:
            leave_out(network, block)
        size = architecture.get(RESOLUTION)
        if size is not None and size != _image_size(self._example_inputs):
            resize_images(network, size)
        return network

    def with_model(self, model: nn.Module, ranking: Mapping[str, list[int]] | None = None) -> ElasticCNN:
        """The same sub-networks with other weights.

        Args:
            model: A model of the same structure.
            ranking: Another order of channels.
        """
        ranking = self.ranking if ranking is None else ranking
        return ElasticCNN(model, self._example_inputs, self.parts, self.places, ranking, self.resolutions)

    def specs(self, whole: ModelSpec) -> CNNSpecs:
        """What tells the structure of sub-networks without building them; the model is traced once for each resolution.

        Args:
            whole: The whole model's structure.
        """
        wholes: dict[int | None, ModelSpec] = {None: whole}
        for size in self.resolutions:
            if size != _image_size(self._example_inputs):
                network = copy.deepcopy(self.model)
                resize_images(network, size)
                wholes[size] = ModelSpec.from_model(network, self._example_inputs)
        return CNNSpecs(wholes, self.parts)


def elastic_cnn(
    model: nn.Module,
    example_inputs: Any,
    *,
    task: Task | None = None,
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    depth: bool = True,
    kernels: bool = True,
    resolutions: Sequence[int] = (),
) -> tuple[ElasticCNN, dict[str, Any]]:
    """A builder of sub-networks and its dimensions, for `Task(build=..., architecture=...)`.

    Any model that can be traced will do. A block can be left out if it stands in an
    `nn.Sequential` or an `nn.ModuleList`, takes one tensor and adds something to it: a residual
    block without a change of shape. Convolutions with odd kernels of 5 or more can be cropped, down
    to 3, if they are padded accordingly. What is left comes in multiples of 8 channels where there
    are as many.

    Args:
        model: The model.
        example_inputs: Inputs of two samples: a tensor, a tuple or a dict, batch first.
        task: A task with this model; channels are then ranked by their effect on its loss,
            otherwise by their weights alone.
        widths: Shares of a group's channels that can stay; empty to leave them out.
        depth: Whether blocks can be left out.
        kernels: Whether kernels can be cropped.
        resolutions: Smaller sizes (height and width, in pixels) that square images can be scaled to
            before the network sees them.

    Returns:
        The builder, and its dimensions: for each block that can be left out "keep", "width" (of the
        channels inside of it) and "kernel", which matter while it is kept; for each group of
        channels outside of such blocks, a stage's for example, "width" under the group's name; for
        other convolutions "kernel"; and "resolution".

    Raises:
        ConfigError: If nothing is left to search, a share is not in (0, 1], or the model does not
            run at a resolution.
        UntraceableModelError: If the model cannot be traced.
    """
    if any(not 0 < share <= 1 for share in widths):
        raise ConfigError(f"widths: {list(widths)} was given, shares above 0 and up to 1 are allowed")
    spec = task.spec if task is not None else ModelSpec.from_model(model, example_inputs)
    places = places_of(model, example_inputs, [g for g in spec.prunable_groups if not g.is_heads]) if widths else {}
    parts = _parts(
        {group.name: group for group in spec.prunable_groups if group.name in places},
        blocks=residual_blocks(model, example_inputs) if depth else (),
        kernels=large_kernels(model) if kernels else {},
    )
    architecture: dict[str, Any] = {}
    for part in parts:
        if dimensions := _dimensions(part, widths):
            architecture[part.name] = dimensions
    sizes = _checked_resolutions(model, example_inputs, resolutions)
    if sizes:
        architecture[RESOLUTION] = tune.choice(list(sizes))
    if not architecture:
        raise ConfigError("widths, depth, kernels, resolutions: nothing is left to search")
    scores = channels_by_taylor(model, spec, task) if task is not None else channels_by_magnitude(model, spec)
    ranking = {name: values.argsort(descending=True, stable=True).tolist() for name, values in scores.items()}
    return ElasticCNN(model, example_inputs, parts, places, ranking, sizes), architecture


def _parts(
    groups: Mapping[str, GroupSpec], blocks: tuple[str, ...], kernels: Mapping[str, tuple[int, ...]]
) -> tuple[Part, ...]:
    """Blocks that can be left out, then groups and convolutions outside of them."""
    parts: dict[str, Part] = {}
    for block in blocks:
        inside = f"{block}."
        own = {name: g.width for name, g in groups.items() if all(layer.startswith(inside) for layer in g.layers)}
        cropped = {name: sizes for name, sizes in kernels.items() if name.startswith(inside)}
        parts[block] = Part(block, own, cropped, is_block=True)
    taken_groups = {name for part in parts.values() for name in part.groups}
    taken_kernels = {name for part in parts.values() for name in part.kernels}
    for name in dict.fromkeys((*groups, *kernels)):
        own = {name: groups[name].width} if name in groups and name not in taken_groups else {}
        cropped = {name: kernels[name]} if name in kernels and name not in taken_kernels else {}
        if own or cropped:
            parts[name] = Part(name, own, cropped)
    return tuple(parts.values())


def _dimensions(part: Part, widths: Sequence[float]) -> dict[str, Any]:
    dimensions: dict[str, Any] = {}
    if any(len({kept_channels(share, width) for share in widths}) > 1 for width in part.groups.values()):
        dimensions["width"] = tune.choice(sorted(set(widths)))
    if sizes := {size for sizes in part.kernels.values() for size in sizes}:
        dimensions["kernel"] = tune.choice(sorted(sizes))
    if part.is_block:
        place = f"architecture/{part.name}/keep"
        conditional = {key: when(domain, place, [True]) for key, domain in dimensions.items()}
        return {"keep": tune.choice([True, False]), **conditional}
    return dimensions


def _checked_resolutions(model: nn.Module, example_inputs: Any, sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes with that of the example, ascending."""
    if not sizes:
        return ()
    own = _image_size(example_inputs)
    if own is None:
        raise ConfigError("resolutions: the model has no square images, of shape (batch, channels, size, size)")
    if any(isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= own for size in sizes):
        raise ConfigError(f"resolutions: {list(sizes)} was given, whole numbers from 1 to {own} are allowed")
    expected = call(model, example_inputs).shape
    for size in sizes:
        network = copy.deepcopy(model).eval()
        resize_images(network, size)
        try:
            fits = call(network, example_inputs).shape == expected
        except RuntimeError:
            fits = False
        if not fits:
            raise ConfigError(f"resolutions: {size} was given, at which a {type(model).__name__} does not run")
    return tuple(sorted({*sizes, own}))


def _image_size(example_inputs: Any) -> int | None:
    """Height and width of square images."""
    for value in tensors_of(example_inputs).values():
        if isinstance(value, Tensor) and Resize.takes(value):
            return int(value.shape[-1])
    return None
