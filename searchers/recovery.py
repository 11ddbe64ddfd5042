"""What a restored searcher makes of the observation log, of Tune's snapshot, and of its own state.

The three are written at different times. Tune's snapshot says which trials there are; the log
says what was reported; the searcher's own state says what it has learnt. After a death of the
driver they may disagree, and every result has to be told once all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_nascomp.observation_log import Record
from ray_nascomp.observations import Observation

_ENDED = ("TERMINATED", "ERROR")


@dataclass
class Recovery:
    """What has to be put right.

    Attributes:
        forget: Trials that the searcher knows and Tune does not: Tune will run them again.
        resume: Trial -> config of trials that Tune runs on and the searcher does not know.
        complete: Records of trials that have ended for Tune and not for the searcher, with
            whether they failed.
        lost: Configs that Tune has to be given again, oldest first.
    """

    forget: set[str] = field(default_factory=set)
    resume: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    complete: list[tuple[Record, bool]] = field(default_factory=list)
    lost: list[Mapping[str, Any]] = field(default_factory=list)


def plan_recovery(
    records: Sequence[Record],
    statuses: Mapping[str, str],
    observations: Sequence[Observation],
    pending: Mapping[str, Mapping[str, Any]],
) -> Recovery:
    """Compares the three.

    Args:
        records: The observation log, oldest first.
        statuses: Trial id -> status in Tune's snapshot.
        observations: What the searcher has learnt, earlier searches' results among them.
        pending: Trial id -> config of trials that run, for the searcher.
    """
    plan = Recovery()
    logged = {record.trial_id for record in records}
    # An observation without a record is an earlier search's: it is none of Tune's trials.
    plan.forget = {o.trial_id for o in observations if o.trial_id in logged and o.trial_id not in statuses}
    unlogged = [trial_id for trial_id in pending if trial_id not in statuses]
    plan.forget.update(unlogged)
    observed = {o.trial_id for o in observations}
    for record in records:
        status = statuses.get(record.trial_id)
        if status is None:
            plan.lost.append(record.config)
        elif record.trial_id in observed:
            continue
        elif status in _ENDED:
            plan.complete.append((record, status == "ERROR"))
        elif record.trial_id not in pending:
            plan.resume[record.trial_id] = record.config
    plan.lost.extend(pending[trial_id] for trial_id in unlogged if trial_id not in logged)
    return plan
