"""The file of a task's own model, made as every candidate's is."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ray_nascomp.compression.fold import fold_batch_norm
from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.export import export_onnx

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task


def export_dense(task: Task) -> bytes:
    """The model with batch normalisations folded, in floating point, as an ONNX file's content.

    Raises:
        ExportError: If no exporter succeeds.
    """
    network = copy.deepcopy(task.model).cpu().eval()
    fold_batch_norm(network, task.example_inputs)
    return compact(export_onnx(network, task.example_inputs, task.input_names))
