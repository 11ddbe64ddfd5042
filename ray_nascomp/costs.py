"""What a plan costs, exactly and before any trial runs: params, MACs, bit operations, bytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_nascomp.errors import InfeasibleError, LayerCollapsedError
from ray_nascomp.model_spec import LayerSpec, ModelSpec, resize
from ray_nascomp.plan import CompressionPlan

if TYPE_CHECKING:
    from ray_nascomp.tasks.base import Task

_FLOAT_BYTES = 4
# Measured on exported files: a node, its names and the headers of its tensors.
_BYTES_A_LAYER = 255
_BYTES_A_QUANTIZED_LAYER = 520
_BYTES_A_FILE = 60


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer under a plan.

    Attributes:
        name: Dotted module name.
        kind: Kind of the layer, as in `LayerSpec`.
        params: Parameters.
        macs: Multiply-accumulates of one sample.
        bits: Bits of the weights.
        bytes: Bytes of the parameters in the exported file.
    """

    name: str
    kind: str
    params: int
    macs: int
    bits: int
    bytes: int


def removed_channels(plan: CompressionPlan, base: ModelSpec, spec: ModelSpec) -> dict[str, int]:
    """Number of channels that a plan removes from each group.

    Args:
        plan: The plan; its groups are those of `base`.
        base: The task's own model.
        spec: The plan's architecture, whose groups take the sparsity of their first layer.

    Raises:
        LayerCollapsedError: If a group would be left without channels.
    """
    if plan.prune.method == "level" or plan.prune.is_identity:
        return {}
    removed = {}
    for group in spec.prunable_groups:
        owner = next((found for layer in group.layers if (found := base.group_of(layer))), group)
        sparsity = plan.prune.of(owner.name)
        count = math.floor(sparsity * group.width + 0.5 + 1e-9)
        if count >= group.width:
            raise LayerCollapsedError(
                f"group {group.name!r} has {group.width} channels; a sparsity of {sparsity:g} would leave none"
            )
        removed[group.name] = group.width - _rounded(group.width - count, group.width, plan.prune.round_to)
    return removed


def _rounded(kept: int, width: int, multiple: int) -> int:
    """The nearest multiple that a group can have; a group that is whole or narrower stays as it is."""
    if kept == width or width <= multiple:
        return kept
    return min(width, max(multiple, round(kept / multiple) * multiple))


def layer_costs(spec: ModelSpec, removed: Mapping[str, int], bits: Callable[[str], int]) -> list[LayerCost]:
    """The cost of every layer.

    Args:
        spec: The model before channels are removed.
        removed: Group name -> number of removed channels.
        bits: Function from a layer's name to its bits.
    """
    folded = {layer.folds_into for layer in spec.layers}
    return [_layer_cost(layer, removed, bits(layer.name), layer.name in folded) for layer in spec.layers]


class CostModel:
    """Costs of configs for a task: a function that searchers call.

    Args:
        task: The task; its weights are neither kept nor pickled.

    Raises:
        UntraceableModelError: If the task's model cannot be traced.
    """

    def __init__(self, task: Task) -> None:
        self.spec = task.spec
        self._specs: dict[str, ModelSpec] = {"": self.spec}
        self._builder = _SpecBuilder(task) if task.build is not None else None
        self._dense = self.of_plan(CompressionPlan())

    def __call__(self, config: Mapping[str, Any]) -> dict[str, float]:
        """The known metrics of a config.

        Returns:
            params, macs (of one sample), bitops (MACs times bits of weights and activations),
            size_mb (of the exported file, 10^6 bytes, within a few percent), params_ratio,
            macs_ratio and size_ratio (the task's own model over the compressed one, 1 or more).

        Raises:
            ConfigError: If the config is not valid.
            InfeasibleError: If the plan cannot be carried out.
        """
        cost = self.of_plan(CompressionPlan.from_config(config, self.spec))
        for name, metric in (("params_ratio", "params"), ("macs_ratio", "macs"), ("size_ratio", "size_mb")):
            cost[name] = self._dense[metric] / cost[metric]
        return cost

    def many(self, configs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The known metrics of several configs, each an array of shape `(configs,)`; NaN where infeasible."""
        rows: list[dict[str, float]] = []
        for config in configs:
            try:
                rows.append(self(config))
            except InfeasibleError:
                rows.append({})
        names = {name for row in rows for name in row}
        return {name: np.array([row.get(name, np.nan) for row in rows]) for name in sorted(names)}

    def canonical(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values that configs with the same meaning share."""
        plan = CompressionPlan.from_config(config, self.spec)
        canonical = plan.canonical()
        if "prune" in canonical and plan.prune.method != "level":
            # Sparsities that remove the same channels mean the same.
            with suppress(InfeasibleError):
                counts = removed_channels(plan, self.spec, self.spec_of(plan))
                canonical["prune"] = {"method": plan.prune.method, "sparsity": {n: c for n, c in counts.items() if c}}
        if self._builder is not None:
            canonical["architecture"] = self._builder.key(plan.architecture)
            layers = {layer.name for layer in self.spec_of(plan).layers}
            for stage, key in (("prune", "sparsity"), ("quantize", "bits")):
                if stage in canonical:
                    values = canonical[stage][key]
                    canonical[stage][key] = {n: v for n, v in values.items() if n in layers or n == "*"}
        return canonical

    def of_plan(self, plan: CompressionPlan) -> dict[str, float]:
        """Absolute costs of a plan: params, macs, bitops, size_mb.

        Raises:
            InfeasibleError: If the plan cannot be carried out.
        """
        spec = self.spec_of(plan)
        layers = layer_costs(spec, removed_channels(plan, self.spec, spec), plan.quantize.of)
        macs = sum(layer.macs for layer in layers)
        return {
            "params": float(sum(layer.params for layer in layers) + spec.extra_params),
            "macs": float(macs + spec.extra_macs),
            "bitops": float(sum(layer.macs * layer.bits**2 for layer in layers) + spec.extra_macs * 32**2),
            "size_mb": (_file_bytes(layers) + spec.extra_params * _FLOAT_BYTES) / 1e6,
        }

    def spec_of(self, plan: CompressionPlan) -> ModelSpec:
        """The structure of a plan's architecture before channels are removed."""
        if self._builder is None or not plan.architecture:
            return self.spec
        key = self._builder.key(plan.architecture)
        if key not in self._specs:
            self._specs[key] = self._builder.spec(plan.architecture)
        return self._specs[key]


class _SpecBuilder:
    """Structures of architectures, from the user's builder alone."""

    def __init__(self, task: Task) -> None:
        from torch import nn

        self._task = copy.copy(task)
        self._task.model = nn.Identity()
        self._task.train_data = self._task.val_data = None  # type: ignore[assignment]
        self._task.test_data = self._task.calibration_data = None
        self._task.example_inputs = task.example_inputs

    def key(self, architecture: Mapping[str, Any]) -> str:
        return self._task.architecture_key(architecture)

    def spec(self, architecture: Mapping[str, Any]) -> ModelSpec:
        return self._task.trace(architecture)[1]


def _layer_cost(layer: LayerSpec, removed: Mapping[str, int], bits: int, has_norm: bool) -> LayerCost:
    shape = resize(layer, removed)
    if not shape:
        return LayerCost(layer.name, layer.kind, layer.fixed_params, 0, 32, layer.fixed_params * _FLOAT_BYTES)
    weights, channels = math.prod(shape), shape[0]
    params = weights + (channels if layer.bias else 0)
    if not layer.is_compressible:
        size = 0 if layer.folds_into else params * _FLOAT_BYTES
        return LayerCost(layer.name, layer.kind, params, 0, 32, size)
    # Folding a batch normalisation gives the convolution a bias.
    bias_bytes = channels * _FLOAT_BYTES if layer.bias or has_norm else 0
    weight_bytes = weights * _FLOAT_BYTES if bits == 32 else weights + channels * (_FLOAT_BYTES + 1)
    return LayerCost(layer.name, layer.kind, params, weights * layer.positions, bits, weight_bytes + bias_bytes)


def _file_bytes(layers: Iterable[LayerCost]) -> int:
    total = _BYTES_A_FILE
    for layer in layers:
        total += layer.bytes
        if layer.macs:
            total += _BYTES_A_QUANTIZED_LAYER if layer.bits != 32 else _BYTES_A_LAYER
    return total
