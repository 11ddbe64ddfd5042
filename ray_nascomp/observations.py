"""What was tried and what came of it: the record that searchers learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ray.tune.result import AUTO_RESULT_KEYS, DEFAULT_EXPERIMENT_INFO_KEYS

_OF_TUNE = {*AUTO_RESULT_KEYS, *DEFAULT_EXPERIMENT_INFO_KEYS, "done"}


class Status(str, Enum):
    """How a trial ended."""

    COMPLETED = "completed"
    """It reported its last step: the metrics are final."""
    STOPPED = "stopped"
    """A scheduler ended it early: the metrics are of a lower fidelity."""
    INFEASIBLE = "infeasible"
    """The plan could not be carried out, or a known cost breaks a constraint."""
    FAILED = "failed"
    """It raised, or reported nothing that can be used."""


@dataclass(frozen=True)
class Observation:
    """One trial's config and outcome.

    Args:
        trial_id: Tune's id of the trial.
        config: The suggested config, nested, plain values.
        metrics: The last reported metrics; empty for a failed trial.
        status: How the trial ended.
        fidelity: `training_iteration` of the last report, 0 where there was none.
    """

    trial_id: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    status: Status = Status.COMPLETED
    fidelity: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "trial_id": self.trial_id,
            "config": dict(self.config),
            "metrics": dict(self.metrics),
            "status": self.status.value,
            "fidelity": self.fidelity,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Observation:
        """The observation of `to_dict`."""
        return cls(**{**data, "status": Status(data["status"])})


def reported_names(result: Mapping[str, Any]) -> str:
    """What a trainable itself has reported, without what Tune adds: names for a message."""
    names = sorted(str(name) for name in result if name not in _OF_TUNE and "/" not in str(name))
    return ", ".join(names) or "nothing"
