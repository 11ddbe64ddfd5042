"""A convolutional network's blocks: which ones can be left out, and which kernels can be cropped."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.tasks.calling import call

_SMALLEST_KERNEL = 3
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def residual_blocks(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    """Names of the blocks that can be left out, in the model's order.

    A block is a member of an `nn.Sequential` or an `nn.ModuleList` that holds a convolution, takes
    one tensor and gives one of the same shape, and passes on what it is given where its
    parameters are all zero: a sum of its input and of what its layers make of it. Of blocks within
    blocks the innermost count.

    Args:
        model: The model, in any mode.
        example_inputs: Inputs that it runs on.
    """
    traced = copy.deepcopy(model).eval()
    candidates = [
        f"{name}.{key}" if name else key
        for name, module in traced.named_modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList))
        for key, child in module.named_children()
        if any(isinstance(layer, _CONVOLUTIONS) for layer in child.modules())
    ]
    seen: dict[str, list[tuple[Any, Any]]] = {name: [] for name in candidates}

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
            # What a block is given may be changed in place by its successor's activation.
            given = inputs[0].clone() if len(inputs) == 1 and not keywords and isinstance(inputs[0], Tensor) else None
            seen[name].append((given, output))

        return hook

    for name in candidates:
        traced.get_submodule(name).register_forward_hook(remember(name), with_kwargs=True)
    with torch.no_grad():
        call(traced, example_inputs)
    found = [
        name
        for name, calls in seen.items()
        if len(calls) == 1 and calls[0][0] is not None and _passes_on(model.get_submodule(name), *calls[0])
    ]
    return tuple(name for name in found if not any(other.startswith(f"{name}.") for other in found))


def leave_out(model: nn.Module, block: str) -> None:
    """Puts an identity in a block's place; all names stay."""
    parent, _, child = block.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())


def kernel_sizes(layer: Any) -> tuple[int, ...]:
    """Sizes that a convolution's kernel can be cropped to without changing its outputs' positions, its own included.

    Odd ones from 3 on; its own alone where the kernel is not square and odd, or its padding smaller
    than what is cropped.
    """
    size = layer.kernel_size[0]
    if layer.padding_mode != "zeros" or layer.padding == "valid" or set(layer.kernel_size) != {size} or size % 2 == 0:
        return (size,)
    sizes = range(_SMALLEST_KERNEL, size, 2)
    padding = layer.padding
    return (*(s for s in sizes if padding == "same" or min(padding) >= _cropped_padding(layer, s)), size)


def crop_kernel(layer: Any, size: int) -> None:
    """Keeps the centre of a convolution's kernel, in place, as once-for-all networks do (Cai et al. 2020).

    Args:
        layer: The convolution.
        size: One of `kernel_sizes`.
    """
    edge = (layer.kernel_size[0] - size) // 2
    if edge == 0:
        return
    if layer.padding != "same":
        less = _cropped_padding(layer, size)
        layer.padding = tuple(padding - less for padding in layer.padding)
    middle = (slice(None), slice(None), *[slice(edge, -edge)] * len(layer.kernel_size))
    weight = layer.weight.detach()[middle].clone()
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.kernel_size = (size,) * len(layer.kernel_size)
    doubled = layer._reversed_padding_repeated_twice
    layer._reversed_padding_repeated_twice = [max(0, width - edge * layer.dilation[0]) for width in doubled]


def large_kernels(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name of each convolution whose kernel can be cropped -> the sizes, ascending, its own last."""
    found = {name: kernel_sizes(m) for name, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)}
    return {name: sizes for name, sizes in found.items() if len(sizes) > 1}


def _cropped_padding(layer: Any, size: int) -> int:
    return int(layer.dilation[0] * (layer.kernel_size[0] - size) // 2)


def _passes_on(block: nn.Module, given: Tensor, output: Any) -> bool:
    if not isinstance(output, Tensor) or output.shape != given.shape:
        return False
    empty = copy.deepcopy(block).eval()
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
        return torch.equal(empty(given.clone()), given)
