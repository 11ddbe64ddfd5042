"""What a plan costs, exactly and before any trial runs: params, MACs, bit operations, bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_nascomp import registry
from ray_nascomp.costs.cost_table import CostTable
from ray_nascomp.costs.file_layout import FileLayout
from ray_nascomp.errors import InfeasibleError, LayerCollapsedError
from ray_nascomp.model_spec import ModelSpec
from ray_nascomp.plan import ALL, CompressionPlan

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task

_RATIOS = (("params_ratio", "params"), ("macs_ratio", "macs"), ("size_ratio", "size_mb"))


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer under a plan.

    Attributes:
        name: Dotted module name.
        kind: Kind of the layer, as in `LayerSpec`.
        params: Parameters.
        macs: Multiply-accumulates of one sample.
        bits: Bits of the weights.
        bytes: Bytes that it takes in the exported file: parameters, scales, and the nodes that read them.
        rank: Rank of its factors; 0 for a layer that is whole.
    """

    name: str
    kind: str
    params: int
    macs: int
    bits: int
    bytes: int
    rank: int = 0


class CostModel:
    """Costs of configs for a task: a function that searchers call.

    Args:
        task: The task; its weights are neither kept nor pickled.

    Raises:
        UntraceableModelError: If the task's model does not run on its own inputs.
    """

    def __init__(self, task: Task) -> None:
        self.spec = task.spec
        self._resolver = task.resolver
        self._layout = task.file_layout
        size = self._layout.size
        self._rest = size - CostTable(self.spec, self._layout).dense_bytes() if size is not None else None
        self._tables: dict[str, _Architecture] = {"": _Architecture(self.spec, self.spec, self._layout, self._rest)}
        self._architectures = task.architectures.without_weights()
        whole = CostModel(task.original) if task.original is not None else self
        self._dense = whole.of_plan(CompressionPlan())

    def __call__(self, config: Mapping[str, Any]) -> dict[str, float]:
        """The known metrics of a config.

        Returns:
            params, macs (of one sample), bitops (MACs times bits of weights and activations),
            size_mb (of the exported file, 10^6 bytes, to about a percent), params_ratio,
            macs_ratio and size_ratio (the task's own model over the compressed one, 1 or more).

        Raises:
            ConfigError: If the config is not valid.
            InfeasibleError: If the plan cannot be carried out.
        """
        cost = self.of_plan(self.plan(config))
        return cost | {name: self._dense[metric] / cost[metric] for name, metric in _RATIOS}

    def many(self, configs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The known metrics of several configs, each an array of shape `(configs,)`; NaN where infeasible.

        Raises:
            ConfigError: If a config is not valid.
        """
        rows: dict[str, list[int]] = {}
        plans = [self.plan(config) for config in configs]
        reasons: list[str | None] = [None] * len(plans)
        for index, plan in enumerate(plans):
            try:
                rows.setdefault(self._key(plan), []).append(index)
            except InfeasibleError as error:
                reasons[index] = str(error)
        result: dict[str, np.ndarray] = {}
        for key, indices in rows.items():
            batch = _Batch(self._tables[key], [plans[i] for i in indices])
            totals = batch.table.totals(batch.layers, batch.removed)
            feasible = ~batch.collapsed.any(axis=1)
            for metric, values in totals.items():
                column = result.setdefault(metric, np.full(len(plans), np.nan))
                column[indices] = np.where(feasible, values, np.nan)
        for metric in ("params", "macs", "bitops", "size_mb"):
            result.setdefault(metric, np.full(len(plans), np.nan))
        return result | {name: self._dense[metric] / result[metric] for name, metric in _RATIOS}

    def plan(self, config: Mapping[str, Any]) -> CompressionPlan:
        """The validated plan of a config, with numbers in place of what depends on weights.

        Raises:
            ConfigError: If the config is not valid.
        """
        plan = CompressionPlan.from_config(config, self.spec)
        return self._resolver.resolve(plan) if plan.depends_on_weights else plan

    def canonical(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values that configs with the same meaning share."""
        plan = self.plan(config)
        canonical = plan.canonical()
        if "prune" in canonical and plan.prune.removes_units:
            # Sparsities that remove the same channels mean the same.
            with suppress(InfeasibleError):
                counts = self.removed(plan)
                prune = {key: value for key, value in canonical["prune"].items() if key not in ("scope", "round_to")}
                canonical["prune"] = prune | {"sparsity": {n: c for n, c in counts.items() if c}}
        if plan.architecture:
            canonical["architecture"] = self._architectures.key(plan.architecture)
            layers = {layer.name for layer in self.spec_of(plan).layers}
            for stage, key in (("prune", "sparsity"), ("quantize", "bits"), ("low_rank", "rank")):
                if stage in canonical:
                    values = canonical[stage][key]
                    canonical[stage][key] = {n: v for n, v in values.items() if n in layers or n == "*"}
        return canonical

    def of_plan(self, plan: CompressionPlan) -> dict[str, float]:
        """Absolute costs of a plan: params, macs, bitops, size_mb.

        Raises:
            InfeasibleError: If the plan cannot be carried out.
        """
        batch = self._single(plan)
        totals = batch.table.totals(batch.layers, batch.removed)
        return {metric: float(values[0]) for metric, values in totals.items()}

    def layers(self, plan: CompressionPlan) -> list[LayerCost]:
        """The cost of every layer of the plan's architecture.

        Raises:
            InfeasibleError: If the plan cannot be carried out.
        """
        batch = self._single(plan)
        costs = batch.layers
        return [
            LayerCost(
                layer.name,
                layer.kind,
                round(costs.params[0, i]),
                round(costs.macs[0, i]),
                int(batch.bits[0, i]),
                round(costs.bytes[0, i]),
                int(batch.ranks[0, i]),
            )
            for i, layer in enumerate(batch.table.spec.layers)
        ]

    def removed(self, plan: CompressionPlan) -> dict[str, int]:
        """Number of units that a plan removes from each group of its architecture.

        Raises:
            LayerCollapsedError: If a group would be left without units.
        """
        batch = self._single(plan)
        return {
            group.name: int(count)
            for group, count in zip(batch.table.spec.groups, batch.removed[0], strict=True)
            if group.prunable
        }

    def ranks(self, plan: CompressionPlan) -> dict[str, int]:
        """Layer name -> rank of its factors, for the layers of the plan's architecture that are factorised.

        Raises:
            InfeasibleError: If the plan cannot be carried out.
        """
        batch = self._single(plan)
        return {
            layer.name: int(rank) for layer, rank in zip(batch.table.spec.layers, batch.ranks[0], strict=True) if rank
        }

    def spec_of(self, plan: CompressionPlan) -> ModelSpec:
        """The structure of a plan's architecture before channels are removed."""
        return self._tables[self._key(plan)].spec

    def _single(self, plan: CompressionPlan) -> _Batch:
        batch = _Batch(self._tables[self._key(plan)], [plan])
        for index in batch.collapsed[0].nonzero()[0]:
            group = batch.table.spec.groups[index]
            units = "heads" if group.is_heads else "channels"
            raise LayerCollapsedError(
                f"group {group.name!r} has {group.width} {units}; a sparsity of {batch.sparsity[0, index]:g} "
                "would leave none"
            )
        return batch

    def _key(self, plan: CompressionPlan) -> str:
        if not plan.stages and not plan.architecture:
            return ""
        architecture = self._architectures.key(plan.architecture)
        key = json.dumps([architecture, plan.stages, plan.order if plan.stages else None], sort_keys=True, default=str)
        if key not in self._tables:
            spec = self._architectures.spec_of(plan.architecture) if architecture else self.spec
            own = registry.registered("stage")
            for name in plan.order:
                if name in plan.stages:
                    spec = own[name]().specify(spec, plan.stages[name])
            share = len(spec.layers) / len(self.spec.layers)
            rest = self._rest * share if self._rest is not None else None
            self._tables[key] = _Architecture(spec, self.spec, self._layout, rest)
        return key


class _Architecture:
    """An architecture's table, and the names that its groups and layers have in configs."""

    def __init__(self, spec: ModelSpec, base: ModelSpec, layout: FileLayout, rest: float | None) -> None:
        self.spec = spec
        self._base = base
        self._layout = layout
        self._rest = rest

    @cached_property
    def table(self) -> CostTable:
        return CostTable(self.spec, self._layout, self._rest)

    @cached_property
    def owners(self) -> list[str | None]:
        """Group names in configs: groups take the sparsity of their first layer; None for those that stay whole."""
        names = self._base.prunable_names
        owners = []
        for group in self.spec.groups:
            found = group.name if group.name in names else None
            if found is None:
                candidates = (self._base.group_of(layer) for layer in group.layers)
                found = next((owner.name for owner in candidates if owner is not None), group.name)
            owners.append(found if group.prunable else None)
        return owners

    @cached_property
    def widths(self) -> np.ndarray:
        return np.array([group.width for group in self.spec.groups], float)

    @cached_property
    def multiples_matter(self) -> np.ndarray:
        """Groups whose width comes in multiples: channels, not heads."""
        return np.array([not group.is_heads for group in self.spec.groups], bool)

    @cached_property
    def layer_names(self) -> list[str]:
        return [layer.config_name for layer in self.spec.layers]


class _Batch:
    """Some plans of one architecture, as arrays with a row for each."""

    def __init__(self, architecture: _Architecture, plans: Sequence[CompressionPlan]) -> None:
        self.table = architecture.table
        self.sparsity, self.removed, self.collapsed = _removed(architecture, plans)
        shape = (len(plans), len(architecture.layer_names))
        wanted = _values([plan.quantize.bits for plan in plans], architecture.layer_names, 32.0)
        self.bits = self.table.effective_bits(wanted)
        share = _values([plan.low_rank.rank for plan in plans], architecture.layer_names, 1.0)
        if (share < 1).any():
            # What is gone when the layers are factorised.
            prune_first = np.array([plan.order.index("prune") < plan.order.index("low_rank") for plan in plans])
            gone = self.removed * prune_first[:, None]
            round_to = np.array([plan.low_rank.round_to for plan in plans])
            self.ranks = self.table.ranks(share, round_to, gone)
            sides = self.table.sides(gone)
        else:
            self.ranks = np.zeros(shape)
            sides = (self.ranks, self.ranks)
        self.layers = self.table.layers(self.removed, self.ranks, sides, wanted)


def _values(given: Sequence[Mapping[str, float]], names: Sequence[str | None], identity: float) -> np.ndarray:
    """Each plan's value of each name, shape `(plans, names)`: its own, that of all others, or the identity."""
    rows = np.full((len(given), len(names)), identity)
    for row, values in enumerate(given):
        if values:
            default = values.get(ALL, identity)
            rows[row] = [*map(values.get, names, repeat(default))]  # type: ignore[arg-type]  # None is no key of it.
    return rows


def _removed(
    architecture: _Architecture, plans: Sequence[CompressionPlan]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sparsities, numbers of removed units, and where nothing would be left; each of shape `(plans, groups)`."""
    width = architecture.widths
    given = [plan.prune.sparsity if plan.prune.removes_units else {} for plan in plans]
    owned = np.array([name is not None for name in architecture.owners], bool)
    sparsity = np.where(owned, _values(given, architecture.owners, 0.0), 0.0)
    multiple = np.array([[plan.prune.round_to if values else 1] for plan, values in zip(plans, given, strict=True)])
    count = np.floor(sparsity * width + 0.5 + 1e-9)
    kept = width - count
    step = np.where(architecture.multiples_matter & (width > multiple), multiple, 1)
    rounded = np.minimum(width, np.maximum(step, np.round(kept / step) * step))
    collapsed = (count >= width) & (width > 0)
    return sparsity, np.where(collapsed | (kept == width), count, width - rounded), collapsed
