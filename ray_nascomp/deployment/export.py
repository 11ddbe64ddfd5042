"""torch -> ONNX in floating point, with the batch size left open and the result verified."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from ray_nascomp.deployment.runtime import make_session, run_session
from ray_nascomp.errors import NonFiniteModelError
from ray_nascomp.tasks.calling import OutputTensor, call, map_tensors, tensors_of

OPSET = 18
_TOLERANCE = 1e-3


class ExportError(RuntimeError):
    """No exporter gives a file that equals the model."""


def export_onnx(model: nn.Module, example_inputs: Any, input_names: tuple[str, ...]) -> onnx.ModelProto:
    """The model as ONNX in floating point.

    torch's TorchScript exporter is tried first (a tenth of the time on convolutional networks),
    then the one over torch.export. Each result is compared with torch at another batch size.

    Args:
        model: The model, on the CPU; exported in evaluation mode.
        example_inputs: Inputs of at least two samples.
        input_names: Names for the file's inputs, in the order of the inputs.

    Raises:
        NonFiniteModelError: If the model's outputs are not finite.
        ExportError: If no exporter succeeds.
    """
    model.eval()
    tensors = tensors_of(example_inputs)
    keywords = tuple(tensors) if isinstance(example_inputs, dict) else None
    wrapper = OutputTensor(model, keywords).eval()
    failures = []
    for exporter in (_export_torchscript, _export_dynamo):
        try:
            with _quiet():
                proto = exporter(wrapper, tuple(tensors.values()), input_names)
            _verify(proto, model, example_inputs, input_names)
        except NonFiniteModelError:
            raise
        except Exception as error:
            failures.append(f"{exporter.__name__.strip('_')}: {type(error).__name__}: {error}")
        else:
            del proto.graph.value_info[:]
            return proto
    raise ExportError("the model cannot be exported to ONNX; " + "; ".join(failures))


def _export_torchscript(
    wrapper: nn.Module, tensors: tuple[torch.Tensor, ...], names: tuple[str, ...]
) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        wrapper,
        tensors,
        buffer,  # type: ignore[arg-type]  # This exporter writes to buffers too.
        input_names=list(names),
        output_names=["output"],
        dynamic_axes={name: {0: "batch"} for name in (*names, "output")},
        opset_version=OPSET,
        dynamo=False,
    )
    return onnx.load_from_string(buffer.getvalue())


def _export_dynamo(wrapper: nn.Module, tensors: tuple[torch.Tensor, ...], names: tuple[str, ...]) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    program = torch.onnx.export(
        wrapper,
        tensors,
        input_names=list(names),
        output_names=["output"],
        dynamic_shapes=(tuple({0: batch} for _ in tensors),),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _verify(proto: onnx.ModelProto, model: nn.Module, example_inputs: Any, names: tuple[str, ...]) -> None:
    """Compares file and model on one sample and on three: another batch size than was traced."""
    for rows in ([0], [0, 1, 0]):
        inputs = map_tensors(example_inputs, lambda tensor, rows=rows: tensor[rows])
        with torch.no_grad():
            expected = call(model, inputs).numpy()
        if not np.isfinite(expected).all():
            raise NonFiniteModelError("the model's outputs are not finite")
        session = make_session(proto.SerializeToString())
        found = run_session(session, inputs, names)
        scale = max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(found - expected).max()) / scale
        if found.shape != expected.shape or difference > _TOLERANCE:
            raise ExportError(f"the file differs from the model by {difference:.2g} at batch size {len(rows)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporters warn about their own deprecation and print progress; none of it is the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
