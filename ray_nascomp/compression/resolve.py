"""Numbers that depend on a model's weights: found once a task, put in place of what a plan leaves open.

A global sparsity becomes one for each group, a kept energy a rank for each layer, a budget the bits
of each layer. Costs of the resolved plan are exact.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_nascomp import registry
from ray_nascomp.costs.factor_shapes import max_useful_rank
from ray_nascomp.errors import ConfigError
from ray_nascomp.plan import ALL, CompressionPlan, LowRankStage, PruneStage, QuantizeStage

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task


class Resolver:
    """Resolves the plans of a task; it holds small tables, not weights.

    Args:
        task: The task; it has to be alive in this process when a table is first needed.
    """

    def __init__(self, task: Task) -> None:
        self._spec = task.spec
        self._fingerprint = task.fingerprint
        self._bits: dict[tuple[str, float], dict[str, int]] = {}
        self._scores: dict[str, dict[str, np.ndarray]] = {}

    def resolve(self, plan: CompressionPlan) -> CompressionPlan:
        """The plan with numbers in place of what depends on weights.

        Raises:
            ConfigError: If the plan has an architecture of its own, whose weights are not known here,
                or the budget cannot be met.
        """
        if plan.architecture or plan.stages:
            raise ConfigError(
                "prune.scope 'global', low_rank.energy and quantize.budget look at the weights of the task's own "
                "model; with an architecture or a stage of your own give numbers for groups and layers"
            )
        if plan.prune.scope == "global":
            plan = replace(plan, prune=self._prune(plan.prune))
        if plan.low_rank.energy is not None:
            plan = replace(plan, low_rank=self._low_rank(plan.low_rank))
        if plan.quantize.budget is not None:
            plan = replace(plan, quantize=self._quantize(plan.quantize))
        return plan

    def _prune(self, stage: PruneStage) -> PruneStage:
        """The least important units of all groups go; each group keeps at least one."""
        share = stage.sparsity.get(ALL, 0.0)
        if stage.method not in self._scores:
            self._scores[stage.method] = self._score(stage.method)
        names = list(self._scores[stage.method])
        scores = [self._scores[stage.method][name] for name in names]
        owners = np.concatenate([np.full(len(values), index) for index, values in enumerate(scores)])
        everything = np.concatenate(scores)
        # The best unit of a group stays, whatever the others' are.
        for index, values in enumerate(scores):
            everything[np.flatnonzero(owners == index)[values.argmax()]] = np.inf
        gone = np.argsort(everything, kind="stable")[: round(share * len(everything))]
        gone = gone[np.isfinite(everything[gone])]
        counts = np.bincount(owners[gone], minlength=len(names))
        shares = zip(names, counts.tolist(), scores, strict=True)
        sparsity = {name: count / len(values) for name, count, values in shares if count}
        return replace(stage, sparsity=sparsity, scope="group")

    def _low_rank(self, stage: LowRankStage) -> LowRankStage:
        from ray_nascomp.compression.low_rank import rank_for_energy

        assert stage.energy is not None
        rank = {}
        for layer in self._spec.layers:
            largest = max_useful_rank(layer.weight_shape, layer.kind) if layer.factorisable else 0
            if largest:
                wanted = rank_for_energy(self._spectra[layer.name], stage.energy)
                if wanted <= largest:
                    rank[layer.name] = wanted / largest if wanted < largest else 1 - 1e-9
        return replace(stage, rank=rank, energy=None)

    def _quantize(self, stage: QuantizeStage) -> QuantizeStage:
        from ray_nascomp.compression.adaptive import adaptive_bits

        assert stage.budget is not None
        key = (stage.method, stage.budget)
        if key not in self._bits:
            self._bits[key] = adaptive_bits(self._task(), stage.method, stage.budget)
        return replace(stage, bits=self._bits[key], budget=None)

    def _score(self, method: str) -> dict[str, np.ndarray]:
        """The method's own scores of units, as multiples of their mean size in the group."""
        from ray_nascomp.nni_adapter.pruning import unit_scores

        task = self._task()
        model, groups = task.network({}), self._spec.prunable_groups
        own = registry.registered("pruner").get(method)
        if own is not None:
            found = own().importance(model, task, {group.name: group for group in groups}, 0)
            scores = {group.name: np.asarray(found[group.name], float) for group in groups}
        else:
            scores = unit_scores(model, task, method, groups, 0, self._spec)
        return {name: values / max(float(np.abs(values).mean()), 1e-30) for name, values in scores.items()}

    @cached_property
    def _spectra(self) -> dict[str, Any]:
        from ray_nascomp.compression.low_rank import input_covariances, spectra

        task = self._task()
        model = task.network({})
        layers = list(self._spec.factorisable_names)
        return spectra(model, layers, input_covariances(model, layers, task.calibration_batches()))

    def _task(self) -> Task:
        from ray_nascomp.tasks.known import find_task

        task = find_task(self._fingerprint)
        if task is None:
            raise ConfigError("the task is no longer there; keep it while costs that depend on weights are asked for")
        return task
