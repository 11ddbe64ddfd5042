"""A candidate as tensors and plain values, and built again from them: for checkpoints and the stage cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_nascomp.nni_adapter.scales import ActivationScale, LayerScales
from ray_nascomp.pipeline.candidate import Candidate, rebuild_candidate
from ray_nascomp.pipeline.prepare import rebuild_prepared
from ray_nascomp.pipeline.training import Trainer
from ray_nascomp.plan import CompressionPlan
from ray_nascomp.tasks.base import Task


@dataclass(frozen=True)
class Snapshot:
    """A state.

    Attributes:
        tensors: Names with a prefix: `network.`, `mask.`, `scale.` (rounded weights), `map.` (of
            layer-wise distillation) and `optimizer.`.
        facts: Plain values: what was removed, ranks, how far the network is prepared, scales.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @classmethod
    def of(
        cls,
        candidate: Candidate,
        ranks: Mapping[str, int],
        trainer: Trainer | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Snapshot:
        """The state of a candidate, and of what trains it."""
        calibration = candidate.calibration
        tensors = {f"network.{name}": value for name, value in candidate.network.state_dict().items()}
        tensors |= {f"mask.{name}": value for name, value in candidate.masks.items()}
        tensors |= {f"scale.{name}": torch.from_numpy(scales.weight) for name, scales in calibration.items()}
        if trainer is not None:
            tensors |= {f"map.{index:04}": value for index, value in enumerate(trainer.maps)}
        if optimizer is not None:
            tensors |= _optimizer_tensors(optimizer, candidate.network)
        facts = {
            "removed": candidate.removed,
            "ranks": dict(ranks) if candidate.factors else {},
            "is_prepared": candidate.is_prepared,
            "smoothed": candidate.smoothed,
            "calibration": {name: _scale_facts(scales) for name, scales in calibration.items()},
        }
        # Copies: safetensors refuses tensors that share memory, as tied weights do.
        copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        return cls(copies, facts)

    def candidate(self, task: Task, plan: CompressionPlan, stages: Sequence[str] | None = None) -> Candidate:
        """The candidate, built again.

        Args:
            task: The task.
            plan: The candidate's plan.
            stages: The stages that change the structure and that it has behind it; all if absent.
        """
        removed = {name: [int(i) for i in indices] for name, indices in self.facts["removed"].items()}
        candidate = rebuild_candidate(task, plan, removed, self.facts["ranks"], stages)
        self.load_into(candidate, task)
        return candidate

    def load_into(self, candidate: Candidate, task: Task) -> None:
        """Gives a candidate of the same structure this state."""
        if self.facts["is_prepared"] and not candidate.is_prepared:
            rebuild_prepared(candidate, task, self.facts["smoothed"])
        candidate.network.load_state_dict(with_prefix(self.tensors, "network."))
        candidate.masks = with_prefix(self.tensors, "mask.")
        candidate.calibration = {
            name: _scales(facts, self.tensors[f"scale.{name}"]) for name, facts in self.facts["calibration"].items()
        }

    def optimizer(self, trainer: Trainer, network: nn.Module) -> torch.optim.Optimizer | None:
        """The optimizer of the network, if the state holds one; the trainer takes up its maps."""
        trainer.maps = list(with_prefix(self.tensors, "map.").values())
        tensors = with_prefix(self.tensors, "optimizer.")
        if not tensors:
            return None
        optimizer = trainer.make_optimizer(network)
        parameters = dict(network.named_parameters())
        for key, value in tensors.items():
            entry, name = key.split(".", 1)
            parameter = parameters[name]
            value = value.to(parameter.device)
            if value.shape == parameter.shape:
                # The fused step reads weights and moments in the order in which they lie in memory.
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            optimizer.state[parameter][entry] = value
        return optimizer


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: pruning may have changed the parameters' order."""
    return {
        f"optimizer.{entry}.{name}": torch.as_tensor(value)
        for name, parameter in network.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def _scale_facts(scales: LayerScales) -> dict[str, Any]:
    return {
        "input": vars(scales.input) if scales.input is not None else None,
        "output": vars(scales.output) if scales.output is not None else None,
        "bits": scales.bits,
    }


def _scales(facts: Mapping[str, Any], weight: Tensor) -> LayerScales:
    entry, output = (ActivationScale(**facts[key]) if facts[key] is not None else None for key in ("input", "output"))
    return LayerScales(weight.numpy(), entry, output, facts["bits"])
