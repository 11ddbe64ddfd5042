"""What training multiplies in: bfloat16, where that is faster."""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

import torch

from ray_nascomp.tasks.base import Task
from ray_nascomp.tasks.calling import call

_LEAST_MACS = 1e8
"""Multiply-accumulates of a batch from which a processor saves more than conversions cost."""

_logger = logging.getLogger(__name__)


def mixed_precision(device: torch.device, task: Task, macs: float) -> torch.autocast:
    """A context in which layers multiply in bfloat16, where the device has it and it pays.

    Sums stay in float32, and bfloat16 has float32's range, so that no loss has to be scaled. Processors have it
    with AVX-512 BF16 or AMX; models that do not run in it compute in float32 there.

    Args:
        device: Where the model is.
        task: The task.
        macs: Multiply-accumulates of one sample.
    """
    if device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        enabled = device.type == "cpu" and macs * task.batch_size >= _LEAST_MACS and _has_bfloat16() and _runs(task)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@functools.cache
def _has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16; older releases of torch cannot tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


_known: weakref.WeakKeyDictionary[Task, bool] = weakref.WeakKeyDictionary()


def _runs(task: Task) -> bool:
    """Whether the task's own model computes outputs and gradients in bfloat16; tried once."""
    if task not in _known:
        _known[task] = _tried(task)
    return _known[task]


def _tried(task: Task) -> bool:
    model = task.model
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            output = call(model, task.example_inputs).float().sum()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad(output, parameters, allow_unused=True)
    except Exception as error:
        _logger.info("training in float32, as the model does not run in bfloat16: %s", error)
        return False
    finally:
        model.train(training)
    return bool(output.isfinite())
