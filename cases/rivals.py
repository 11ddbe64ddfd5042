"""Searches that a joint one is compared with: the same space in sequence, and Optuna's sampler."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Domain
from ray.tune.utils import flatten_dict
from study import Study

import ray_nascomp as nc
from ray_nascomp.builders import gentle_config
from ray_nascomp.pareto import normalised_hypervolume
from ray_nascomp.results.loading import TrialRecord
from ray_nascomp.searchers import HybridSearch

_STAGES = (("architecture",), ("prune", "low_rank"), ("quantize",))
_FOLDERS = {
    "joint": ("search",),
    "sequence": tuple(f"sequence_{number}" for number in range(len(_STAGES))),
    "optuna": ("optuna",),
}
_TOLD = ("accuracy", "divergence", "params", "size_ratio", "speedup")


def compare_searches(study: Study) -> dict[str, Any]:
    """Carries out all searches and keeps what came of each; nothing is trained to its end, or tested."""
    record: dict[str, Any] = {"case": study.case.name, "seed": study.seed, "trials": {}, "found": {}}
    for name, search in (("joint", Study.joint_search), ("sequence", sequence_search), ("optuna", optuna_search)):
        search(study)
        trials = _trials(study, name)
        record["trials"][name] = len(trials)
        record["found"][name] = _found(study.goal, trials)
        record["hypervolume"] = hypervolumes(study)
        (study.folder / "searches.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _trials(study: Study, name: str) -> list[TrialRecord]:
    return [trial for folder in _FOLDERS[name] for trial in nc.Results(study.folder / folder, study.goal).trials]


def _found(goal: nc.Goal, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """How many results are within the limits, the one of them with the best outputs, and the minutes of all trials."""
    within = _within(goal, trials)
    best = min(within, key=lambda trial: goal.losses(trial.metrics)[0], default=None)
    return {
        "within": len(within),
        "best": {key: best.metrics[key] for key in _TOLD if key in best.metrics} if best else None,
        "minutes": sum(trial.metrics.get("time_total_s", 0.0) for trial in trials) / 60,
    }


def _within(goal: nc.Goal, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [trial for trial in trials if trial.status == "completed" and goal.is_feasible(trial.metrics)]


def sequence_search(study: Study) -> nc.Results:
    """First the architecture is searched, then what is removed, then the bits, with the same trials in all.

    Returns:
        The last stage's results.
    """
    space: dict[str, Any] = {**study.space}
    start = gentle_config(study.space)
    left = study.budget.trials
    for number, (stage, folder) in enumerate(zip(_STAGES, _FOLDERS["sequence"], strict=True)):
        fixed = {key: start[key] if key in start and key not in stage else space[key] for key in space}
        searched = {key: _merged(space[key], fixed[key]) for key in space}
        share = max(1, left // (len(_STAGES) - number))
        results = study.search(folder, partial(_stage_searcher, study, searched, stage), searched, share)
        left -= len(results)
        (best,) = study.best_of(results, 1)
        start = {**start, **{key: best.config[key] for key in stage if key in best.config}}
    return results


def _stage_searcher(study: Study, space: Mapping[str, Any], stage: Sequence[str]) -> HybridSearch:
    """The joint search's own searcher; limits on known costs that no config here keeps are left to a later stage."""
    costs = nc.CostModel(study.task)
    known = costs({})
    kept: list[nc.Constraint] = []
    for constraint in study.goal.constraints:
        goal = nc.Goal(study.goal.objectives, [*kept, constraint])
        if constraint.metric not in known or _has_config(HybridSearch(goal, costs, seed=study.seed), space):
            kept.append(constraint)
    first: list[dict[str, Any]] = []
    for config in study.first:
        part = {key: config[key] for key in stage if key in config}
        if part and part not in first:
            first.append(part)
    goal = nc.Goal(study.goal.objectives, kept)
    return HybridSearch(goal, costs, seed=study.seed, points_to_evaluate=first or None)


def _has_config(searcher: HybridSearch, space: Mapping[str, Any]) -> bool:
    searcher.set_search_properties(None, None, dict(space))
    return searcher.suggest("probe") != Searcher.FINISHED


def _merged(domains: Any, values: Any) -> Any:
    """A part of the space in which the values that are given are fixed."""
    if isinstance(domains, Mapping) and isinstance(values, Mapping):
        return {key: _merged(domain, values[key]) if key in values else domain for key, domain in domains.items()}
    return values


def optuna_search(study: Study) -> nc.Results:
    """Optuna's sampler (TPE) on the same space, with the same first configs; it sees the score that trials report."""
    (folder,) = _FOLDERS["optuna"]
    searched = {path for path, value in flatten_dict(study.space).items() if isinstance(value, Domain)}
    first = [
        {path: value for path, value in flatten_dict(config).items() if path in searched} for config in study.first
    ]
    return study.search(
        folder,
        lambda: OptunaSearch(metric="score", mode="max", seed=study.seed, points_to_evaluate=first or None),
        study.space,
        study.budget.trials,
    )


def hypervolumes(study: Study) -> dict[str, float]:
    """What share of their common box the results within the limits dominate, of each search that is done.

    A search in sequence counts with the results of all its stages.
    """
    goal = study.goal
    losses = {
        name: [goal.losses(trial.metrics) for trial in _within(goal, _trials(study, name))]
        for name, folders in _FOLDERS.items()
        if all(study.is_searched(folder) for folder in folders)
    }
    every = np.concatenate([np.reshape(rows, (-1, len(goal.objectives))) for rows in losses.values()])
    if not len(every):
        return dict.fromkeys(losses, 0.0)
    box = every.min(axis=0), every.max(axis=0)
    return {name: normalised_hypervolume(np.array(rows), *box) if rows else 0.0 for name, rows in losses.items()}
