"""What each stage of a run is made from, as text: seeds and cache keys follow from it.

A stage's text holds everything before it and nothing after it, so that two plans that begin alike
share the randomness, and with a stage cache the work, of what they begin with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Iterable
from typing import Any

import cloudpickle

from ray_nascomp import registry
from ray_nascomp.costs import CostModel
from ray_nascomp.plan import CompressionPlan
from ray_nascomp.tasks.base import Task


class Recipe:
    """The stages of a plan, and what each is made from.

    Args:
        task: The task.
        plan: The plan, resolved.
        costs: The task's cost model, which knows what the plan's shares mean in numbers.
        epochs: Epochs of fine-tuning, which the learning rate follows.

    Attributes:
        stages: Names of the stages that change the structure after the architecture is built,
            in their order; those that do nothing are left out.

    Raises:
        InfeasibleError: If the plan cannot be carried out.
    """

    def __init__(self, task: Task, plan: CompressionPlan, costs: CostModel, epochs: int) -> None:
        # Keys outside of the stages tell repetitions of a plan apart.
        start = {"architecture": task.architectures.key(plan.architecture), "extra": dict(plan.extra)}
        self._quantize = _quantize(plan)
        self._finetune = {**_finetune(plan), "epochs": epochs}
        contents = {
            "prune": _prune(plan, costs, self._finetune, self._quantize),
            "low_rank": {"ranks": ranks} if (ranks := costs.ranks(plan)) else None,
            **{name: {"options": plan.stages[name], **_code("stage", name)} for name in plan.stages},
        }
        self.stages = tuple(name for name in plan.order if contents.get(name) is not None)
        self._structure: list[Any] = [start, *([name, contents[name]] for name in self.stages)]

    def structure(self, stages: int) -> str:
        """What the network is made from after so many of `stages`."""
        return _text(self._structure[: stages + 1])

    def ready(self) -> str:
        """What the compressed network is made from, its batch statistics estimated anew."""
        return _text([self._structure, "ready"])

    def trained(self, epochs: int, quantized: bool) -> str:
        """What the network is made from after so many epochs.

        Args:
            epochs: How many.
            quantized: Whether the last of them trained with simulated integers.
        """
        return _text([self._structure, self._finetune, epochs, self._quantize if quantized else None])

    def rounded(self, state: str, layers: Iterable[str]) -> str:
        """What the integers of some layers are made from, in whatever bits; `state` is the network's own text."""
        return _text([state, "rounded", sorted(layers)])

    def exported(self, state: str) -> str:
        """What the exported file of a network is made from; `state` is the network's own text."""
        return _text([state, "exported", self._quantize])

    def seed(self, stages: int) -> int:
        """The seed of a stage that changes the structure, the `stages`-th from 1; 32 bits."""
        return seed_of(self.structure(stages))

    @property
    def training_seed(self) -> int:
        """The seed of the fine-tuning, 32 bits."""
        return seed_of(_text([self._structure, self._finetune]))


def seed_of(text: str) -> int:
    """A seed of 32 bits that equal texts share."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def code_digest(code: Any) -> str:
    """A digest of a class, a function or a callable object: of its source and of what it closes over.

    Code that it calls is not looked at. What has no source is told by its pickle.
    """
    try:
        content = inspect.getsource(code).encode()
    except (OSError, TypeError):
        content = cloudpickle.dumps(code)
    bound = [cell.cell_contents for cell in getattr(code, "__closure__", None) or ()]
    bound += getattr(code, "__defaults__", None) or ()
    return hashlib.sha256(content + (cloudpickle.dumps(bound) if bound else b"")).hexdigest()[:16]


def _prune(plan: CompressionPlan, costs: CostModel, finetune: Any, quantize: Any) -> dict[str, Any] | None:
    prune = plan.prune
    if prune.is_identity:
        return None
    if prune.removes_units:
        what: dict[str, Any] = {name: count for name, count in costs.removed(plan).items() if count}
        if not what:
            return None
    else:
        what = dict(prune.sparsity)
    content = {"method": prune.method, "what": what, "schedule": prune.schedule, **_code("pruner", prune.method)}
    if prune.schedule != "one_shot":
        content["finetune"] = finetune
    if prune.schedule == "fused":
        content["quantize"] = quantize
    return content


def _finetune(plan: CompressionPlan) -> dict[str, Any]:
    finetune = dataclasses.asdict(plan.finetune)
    if not plan.finetune.distill.weight:
        del finetune["distill"]
    return finetune


def _quantize(plan: CompressionPlan) -> dict[str, Any] | None:
    quantize = plan.quantize
    if quantize.is_identity:
        return None
    content: dict[str, Any] = {
        "method": quantize.method,
        "bits": dict(quantize.bits),
        **_code("quantizer", quantize.method),
    }
    if quantize.trains:
        content["start"] = quantize.start
    return content


def _code(kind: str, name: str) -> dict[str, str]:
    """The code of what a user has registered; empty for what is ours."""
    own = registry.registered(kind).get(name)
    return {"code": code_digest(own)} if own is not None else {}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
