"""The file of a task's own model, made as every candidate's is, and where its layers stand in it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import onnx
from torch import nn

from ray_nascomp.compression.attention import find_attentions
from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.compression.merging import MergedEmbedding
from ray_nascomp.costs.file_layout import FileLayout
from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.places import places_of

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task


def export_dense(task: Task) -> bytes:
    """The model with batch normalisations folded, in floating point, as an ONNX file's content.

    Raises:
        ExportError: If no exporter succeeds.
    """
    return compact(_export(task, copy.deepcopy(task.model)))


def layout_of(task: Task) -> FileLayout:
    """The file of a plan that changes nothing, as far as that of other plans follows from it.

    Raises:
        ExportError: If no exporter succeeds.
    """
    network = task.network({})
    proto = _export(task, network)
    places = places_of(proto.graph, network, [layer.name for layer in task.spec.quantizable_layers])
    return FileLayout(len(compact(proto)), places, bool(find_attentions(network)))


def usual_layout(model: nn.Module) -> FileLayout:
    """What is known of a model's file without making it."""
    rows = sum(module.rows.nbytes for module in model.modules() if isinstance(module, MergedEmbedding))
    return FileLayout(is_smoothed=bool(find_attentions(model)), shared_rows=rows)


def _export(task: Task, network: nn.Module) -> onnx.ModelProto:
    network.cpu().eval()
    fold_batch_norm(network, task.example_inputs)
    return export_onnx(network, task.example_inputs, task.input_names)
