"""torch's two exporters, and what models have to be told before them."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import onnx
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ray_nascomp.deployment.hard_activations import name_hard_activations
from ray_nascomp.deployment.lookups import look_up_tables
from ray_nascomp.deployment.padding import fold_padding
from ray_nascomp.deployment.pooling import use_global_pooling
from ray_nascomp.deployment.sharing import without_copies
from ray_nascomp.tasks.axes import Axes
from ray_nascomp.tasks.calling import OutputTensor, call, tensors_of

OPSET = 18
ATTENTION_OPSET = 23
"""With attention and GELU as operators of their own: the fastest form of a transformer."""


@dataclass(frozen=True)
class Exporter:
    """One way from torch to ONNX.

    Attributes:
        name: "torchscript", or "dynamo" (over torch.export).
        opset: The file's opset.
        attention: What HuggingFace models are told to compute attention with; None leaves it.
    """

    name: Literal["torchscript", "dynamo"]
    opset: int = OPSET
    attention: Literal["sdpa", "eager"] | None = None

    def __str__(self) -> str:
        return f"{self.name}, opset {self.opset}" + (f", {self.attention} attention" if self.attention else "")

    def export(self, model: nn.Module, inputs: Any, names: tuple[str, ...], axes: Axes) -> onnx.ModelProto:
        """The model in evaluation mode as ONNX; its output is called "output".

        Args:
            model: The model.
            inputs: Inputs as it takes them.
            names: Names for the file's inputs.
            axes: The axes of free length.
        """
        tensors = tensors_of(inputs)
        wrapper = OutputTensor(model, tuple(tensors) if isinstance(inputs, dict) else None).eval()
        run = _torchscript if self.name == "torchscript" else _dynamo
        with _quiet(), _ready(model, self.attention):
            proto = run(wrapper, tuple(tensors.values()), names, axes, self.opset)
            return look_up_tables(use_global_pooling(name_hard_activations(proto)), model)


def exporters_for(model: nn.Module, inputs: Any) -> tuple[Exporter, ...]:
    """The ways that are worth trying, the one with the fastest file first.

    Args:
        model: The model; run once.
        inputs: Inputs that it runs on.
    """
    if any(isinstance(module, nn.RNNBase) for module in model.modules()) or not has_attention(model, inputs):
        return (Exporter("torchscript"), Exporter("dynamo"))
    if not any(hasattr(module, "set_attn_implementation") for module in model.modules()):
        return (Exporter("dynamo", ATTENTION_OPSET), Exporter("dynamo"), Exporter("torchscript"))
    return (
        Exporter("dynamo", ATTENTION_OPSET, "sdpa"),
        Exporter("dynamo", ATTENTION_OPSET, "eager"),
        Exporter("torchscript", OPSET, "sdpa"),
        Exporter("torchscript", OPSET, "eager"),
    )


def has_attention(model: nn.Module, inputs: Any) -> bool:
    """Whether the model computes attention: in a module of that name, or by torch's function."""
    if any("attention" in type(module).__name__.lower() for module in model.modules()):
        return True
    with _AttentionSeen() as seen, torch.no_grad():
        call(model, inputs)
    return seen.found


class _AttentionSeen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= getattr(function, "__name__", "") == "scaled_dot_product_attention"
        return function(*args, **(kwargs or {}))


def _torchscript(
    wrapper: nn.Module, tensors: tuple[torch.Tensor, ...], names: tuple[str, ...], axes: Axes, opset: int
) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        wrapper,
        tensors,
        buffer,  # type: ignore[arg-type]  # This exporter writes to buffers too.
        input_names=list(names),
        output_names=["output"],
        dynamic_axes={**dict(zip(names, axes, strict=True)), "output": {0: "batch"}},
        opset_version=opset,
        dynamo=False,
    )
    proto = onnx.load_from_string(buffer.getvalue())
    without_copies(proto.graph)
    return fold_padding(proto)


def _dynamo(
    wrapper: nn.Module, tensors: tuple[torch.Tensor, ...], names: tuple[str, ...], axes: Axes, opset: int
) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    shapes = tuple({axis: torch.export.Dim.DYNAMIC if axis else batch for axis in own} for own in axes)
    program = torch.onnx.export(
        wrapper,
        tensors,
        input_names=list(names),
        output_names=["output"],
        dynamic_shapes=(shapes,),
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    if any(isinstance(module, nn.RNNBase) for module in wrapper.modules()):
        _join_gates(program.model)
    return program.model_proto


def _join_gates(model: Any) -> None:
    """Makes one constant of a recurrent layer's weights; this exporter leaves large ones in pieces."""
    from onnxscript import optimizer

    unlimited = sys.maxsize
    optimizer.fold_constants(model, input_size_limit=unlimited, output_size_limit=unlimited)
    optimizer.remove_unused_nodes(model)


@contextmanager
def _ready(model: nn.Module, attention: str | None) -> Iterator[None]:
    """Within it attention is computed as told, nothing is cached between calls, and no weight has a gradient.

    With one, fused attention under a learned mask is traced as a form that no exporter takes.
    """
    with ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        fused = torch.backends.mha.get_fastpath_enabled()
        undo.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if isinstance(getattr(config, "use_cache", None), bool):
                undo.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
            set_attention: Any = getattr(module, "set_attn_implementation", None)
            if attention is not None and set_attention is not None:
                undo.callback(set_attention, config._attn_implementation)
                set_attention(attention)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporters warn of their own deprecation, print progress and failed graphs; none of it is the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # The TorchScript exporter switches its log of graphs on by itself, whatever it is told.
    log_graph = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._jit_onnx_log = log_graph
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
