"""torch -> ONNX in floating point, with the batch size left open and the result verified."""

from __future__ import annotations

import copy
from typing import Any

import click
import numpy as np
import onnx
import torch
from torch import nn

from ray_nascomp.deployment.exporters import Exporter, exporters_for
from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.deployment.scaling import insert_scales, without_scales
from ray_nascomp.deployment.sharing import share_weights
from ray_nascomp.deployment.templates import Build, Template, Templates
from ray_nascomp.errors import NonFiniteModelError
from ray_nascomp.tasks.axes import Axes, batch_axes, resized, sequence_axes
from ray_nascomp.tasks.calling import call, map_tensors, tensors_of

_TOLERANCE = 1e-3

_worked: dict[tuple[object, ...], tuple[Exporter, bool]] = {}
"""Kind of model -> what exported it last, and whether the sequence was left open: tried first, to save time."""
_templates = Templates()

Names = tuple[str, ...]


class ExportError(RuntimeError):
    """No exporter gives a file that equals the model."""


def export_onnx(model: nn.Module, example_inputs: Any, input_names: tuple[str, ...]) -> onnx.ModelProto:
    """The model as ONNX in 32-bit floating point.

    The ways that torch offers are tried in the order of how fast their file is on this kind of
    model: with attention, torch.export at opset 23; otherwise, and for recurrent layers, the
    TorchScript exporter. Each result is compared with torch at other batch sizes, and at another
    length where the inputs are sequences. Where no file with an open length equals the model, the
    example's length is kept.

    Args:
        model: The model, on the CPU; exported in evaluation mode. One in another precision is
            cast, and so are its inputs when the file is run.
        example_inputs: Inputs of at least two samples.
        input_names: Names for the file's inputs, in the order of the inputs.

    Raises:
        NonFiniteModelError: If the model's outputs are not finite.
        ExportError: If no exporter succeeds.
    """
    model.eval()
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in model.state_dict().values()):
        model = copy.deepcopy(model).float()
    inputs = map_tensors(example_inputs, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    kind = (type(model), input_names, tuple(tensor.ndim for tensor in tensors_of(inputs).values()))
    sequence = sequence_axes(model, inputs)
    ways = [(exporter, True) for exporter in exporters_for(model, inputs)] if sequence is not None else []
    ways += [(exporter, False) for exporter in exporters_for(model, inputs)]
    if _worked.get(kind) in ways:
        ways.insert(0, ways.pop(ways.index(_worked[kind])))
    failures = []
    for exporter, is_open in ways:
        axes = sequence if is_open and sequence is not None else batch_axes(inputs)
        for export in (_fill, _export, _export_scaled):
            try:
                proto = export(exporter, model, inputs, input_names, axes)
                if proto is None:
                    continue
                share_weights(proto.graph)
                _verify(proto, model, inputs, input_names, axes)
            except NonFiniteModelError:
                raise
            except Exception as error:
                _templates.fails(_build(exporter, model, axes))
                failures.append(f"{exporter}: {type(error).__name__}: {click.unstyle(str(error))[:300]}")
            else:
                _worked[kind] = (exporter, is_open)
                return proto
    raise ExportError("the model cannot be exported to ONNX; " + "; ".join(failures))


def _fill(exporter: Exporter, model: nn.Module, _inputs: Any, _names: Names, axes: Axes) -> onnx.ModelProto | None:
    """A graph that is known already, with the model's weights."""
    with without_scales(model) as scales:
        template = _templates.get(_build(exporter, model, axes))
        proto = template.fill(model) if template is not None else None
    if proto is not None:
        insert_scales(proto.graph, scales)
    return proto


def _export(exporter: Exporter, model: nn.Module, inputs: Any, names: Names, axes: Axes) -> onnx.ModelProto:
    """A new graph, kept for other models where it takes its time."""
    with without_scales(model) as scales:
        proto = _new_graph(exporter, model, inputs, names, axes)
        if exporter.name == "dynamo":
            _templates.add(_build(exporter, model, axes), Template.of(proto, model))
    insert_scales(proto.graph, scales)
    return proto


def _export_scaled(
    exporter: Exporter, model: nn.Module, inputs: Any, names: Names, axes: Axes
) -> onnx.ModelProto | None:
    """A new graph of a model with smoothed layers as they are, for graphs in which these are not found."""
    with without_scales(model) as scales:
        pass
    return _new_graph(exporter, model, inputs, names, axes) if scales else None


def _new_graph(exporter: Exporter, model: nn.Module, inputs: Any, names: Names, axes: Axes) -> onnx.ModelProto:
    proto = exporter.export(model, inputs, names, axes)
    _name_axes(proto, names, axes)
    # Without the exporter's notes on inner shapes the runtime finds its own, and plans faster runs.
    del proto.graph.value_info[:]
    return proto


def _build(exporter: Exporter, model: nn.Module, axes: Axes) -> Build:
    with without_scales(model):
        return Build.of(model, (exporter, tuple(tuple(own.items()) for own in axes)))


def _name_axes(proto: onnx.ModelProto, names: tuple[str, ...], axes: Axes) -> None:
    """Gives the free axes of inputs and outputs the names that they have in `axes`."""
    renamed = {}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    for name, own in zip(names, axes, strict=True):
        # An input that the model ignores is not in the file.
        renamed.update({shapes[name][axis].dim_param: label for axis, label in own.items() if name in shapes})
    renamed.pop("", None)
    for value in (*proto.graph.input, *proto.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in renamed:
                dimension.dim_param = renamed[dimension.dim_param]


def _verify(proto: onnx.ModelProto, model: nn.Module, inputs: Any, names: tuple[str, ...], axes: Axes) -> None:
    """Compares file and model on one sample and on three, and at another length: not what was traced."""
    session = make_session(proto.SerializeToString())
    cases = [map_tensors(inputs, lambda tensor, rows=rows: tensor[rows]) for rows in ([0], [0, 1, 0])]
    if any(len(own) > 1 for own in axes):
        cases.append(resized(inputs, axes))
    for case in cases:
        with torch.no_grad():
            expected = call(model, case).numpy()
        if not np.isfinite(expected).all():
            raise NonFiniteModelError("the model's outputs are not finite")
        found = run_session(session, case, names)
        scale = max(1.0, float(np.abs(expected).max()))
        shape = tuple(next(iter(tensors_of(case).values())).shape)
        if found.shape != expected.shape:
            raise ExportError(f"the file's output has shape {found.shape} instead of {expected.shape} at {shape}")
        difference = float(np.abs(found - expected).max()) / scale
        if not difference <= _TOLERANCE:
            raise ExportError(
                f"the file differs from the model by {difference:.2g} at batch size {shape[0]}, inputs of shape {shape}"
            )
