"""A config that has been checked against a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_nascomp import pruners, registry
from ray_nascomp.errors import ConfigError
from ray_nascomp.plan.checks import ALL, mapping
from ray_nascomp.plan.stages import FinetuneStage, LowRankStage, PruneStage, QuantizeStage

if TYPE_CHECKING:
    from ray_nascomp.model_spec import ModelSpec

_OURS = ("prune", "low_rank")

CONTINUE_FROM = "continue_from"
"""Key outside of the stages: a checkpoint within the experiment's folder that a trial goes on from."""


@dataclass(frozen=True)
class CompressionPlan:
    """A validated config.

    Attributes:
        architecture: What the user's builder is called with; empty for the task's own model.
        prune: Pruning.
        low_rank: Factorisation.
        finetune: Training of the compressed model, with distillation.
        quantize: Quantization.
        stages: Name of a user's own stage -> its options, where it does anything.
        order: Names of the stages that change the structure, in the order in which they run.
        extra: Keys of the config that are not ours.
    """

    architecture: Mapping[str, Any] = field(default_factory=dict)
    prune: PruneStage = field(default_factory=PruneStage)
    low_rank: LowRankStage = field(default_factory=LowRankStage)
    finetune: FinetuneStage = field(default_factory=FinetuneStage)
    quantize: QuantizeStage = field(default_factory=QuantizeStage)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    order: tuple[str, ...] = _OURS
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], spec: ModelSpec) -> CompressionPlan:
        """Checks a config against a model.

        Args:
            config: Nested plain values, as a searcher suggests them.
            spec: The task's own model; names of groups and layers are its names.

        Raises:
            ConfigError: For an unknown stage key, group or layer, or a value that is not allowed.
        """
        own = registry.registered("stage")
        stages = {}
        for name, stage in own.items():
            if name in config:
                options = stage().validate(mapping(config[name], name), spec)
                if options:
                    stages[name] = options
        sections = {
            name: mapping(config.get(name, {}), name)
            for name in ("architecture", "prune", "low_rank", "finetune", "quantize")
        }
        known = {*sections, "order", CONTINUE_FROM, *own}
        plan = cls(
            architecture=dict(sections["architecture"]),
            prune=PruneStage.from_section(sections["prune"], spec.prunable_names),
            low_rank=LowRankStage.from_section(sections["low_rank"], spec.factorisable_names),
            finetune=FinetuneStage.from_section(sections["finetune"]),
            quantize=QuantizeStage.from_section(sections["quantize"], spec.quantizable_names),
            stages=stages,
            order=_order(config.get("order"), (*own, *_OURS)),
            extra={key: value for key, value in config.items() if key not in known},
        )
        plan._check_reach(spec)
        plan._check_fused(spec)
        plan._check_methods(spec)
        return plan

    def _check_reach(self, spec: ModelSpec) -> None:
        """Raises a ConfigError where a stage would leave the task's own model as it is."""
        if self.architecture:
            return
        for key, stage, what, names in (
            ("low_rank", self.low_rank, "layer that can be factorised", spec.factorisable_names),
            ("quantize.bits", self.quantize, "layer that can have fewer bits", spec.quantizable_names),
        ):
            if not names and not stage.is_identity:
                raise ConfigError(f"{key}: the model has no {what}; nothing is allowed")

    def _check_fused(self, spec: ModelSpec) -> None:
        """Raises a ConfigError where NNI's fused run cannot do what the other stages say."""
        if self.prune.schedule != "fused" or self.prune.is_identity:
            return
        problem = None
        if not self.quantize.trains or self.quantize.is_identity:
            problem = "needs a quantizer that trains, with fewer than 32 bits"
        elif not self.prune.removes_units:
            problem = f"removes channels, and {self.prune.method!r} single weights"
        elif self.prune.method == "slim":
            problem = "cannot follow slim, whose factors NNI applies to integers"
        elif not self.low_rank.is_identity:
            problem = "prunes whole layers: leave low_rank out"
        elif any(group.is_heads and self.prune.of(group.name) for group in spec.prunable_groups):
            problem = "removes channels only: give attention heads a sparsity of 0"
        if problem is not None:
            raise ConfigError(f"prune.schedule: 'fused' was given; it {problem}")

    def _check_methods(self, spec: ModelSpec) -> None:
        """Raises a ConfigError for a pruner that means nothing on this model or under this quantizer."""
        removes = self.prune.removes_units and not self.prune.is_identity
        if removes and not spec.prunable_names and not self.architecture:
            raise ConfigError(
                f"prune.sparsity: {dict(self.prune.sparsity)} was given, but no channels or heads of this model can be "
                "removed"
            )
        if self.prune.method == "slim":
            for group in spec.prunable_groups:
                reason = pruners.refusal("slim", spec, group) if self.prune.of(group.name) else None
                if reason is not None:
                    raise ConfigError(f"prune.method: 'slim' was given with a sparsity of {group.name!r}; {reason}")
        masked = not self.prune.removes_units and not self.prune.is_identity
        if masked and not self.architecture:
            self._check_masked(spec)
        if masked and self.quantize.method == "bnn" and not self.quantize.is_identity:
            raise ConfigError(
                f"prune.method: {self.prune.method!r} was given with quantize.method 'bnn', whose signs have no zero; "
                "a method that removes channels is allowed"
            )

    def _check_masked(self, spec: ModelSpec) -> None:
        """Raises a ConfigError where a method for single weights finds none."""
        layers = {name for group in spec.prunable_groups if self.prune.of(group.name) for name in group.layers}
        reasons = [pruners.weight_refusal(self.prune.method, layer) for layer in spec.layers if layer.name in layers]
        if None not in reasons:
            reason = (
                f"{reasons[0]}, and the model has none" if reasons else "the model has no group whose weights can go"
            )
            raise ConfigError(f"prune.method: {self.prune.method!r} was given; {reason}")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values."""
        return dataclasses.asdict(self)

    @property
    def depends_on_weights(self) -> bool:
        """Whether some numbers are still to be found from the model's weights (see `CostModel.resolve`)."""
        return (
            (self.prune.scope == "global" and not self.prune.is_identity)
            or self.low_rank.energy is not None
            or self.quantize.budget is not None
        )

    def canonical(self) -> dict[str, Any]:
        """Plain values in which whatever does not matter is left out: equal plans, equal values."""
        plan: dict[str, Any] = {"architecture": dict(self.architecture), "extra": dict(self.extra)}
        active = [*self.stages]
        if self.stages:
            plan["stages"] = {name: dict(options) for name, options in self.stages.items()}
        if not self.prune.is_identity:
            plan["prune"] = {**vars(self.prune), "sparsity": _without(self.prune.sparsity, 0.0)}
            active.append("prune")
        if not self.low_rank.is_identity:
            plan["low_rank"] = {**vars(self.low_rank), "rank": _without(self.low_rank.rank, 1.0)}
            active.append("low_rank")
        finetune = dataclasses.asdict(self.finetune)
        distill = self.finetune.distill
        if not distill.weight and distill.layers == "none":
            del finetune["distill"]
        plan["finetune"] = finetune
        if not self.quantize.is_identity:
            plan["quantize"] = {**vars(self.quantize), "bits": _without(self.quantize.bits, 32)}
            if not self.quantize.trains:
                del plan["quantize"]["start"]
        if len(active) > 1:
            plan["order"] = [name for name in self.order if name in active]
        return plan

    @property
    def seed(self) -> int:
        """A seed that equal plans share, 32 bits."""
        text = json.dumps(self.canonical(), sort_keys=True, default=str)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _without(values: Mapping[str, Any], identity: float) -> dict[str, Any]:
    """The values, without those that say the same as a missing one."""
    return {name: value for name, value in values.items() if value != identity or ALL in values}


def _order(given: Any, allowed: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return allowed
    if not isinstance(given, (list, tuple)) or sorted(given) != sorted(allowed):
        raise ConfigError(f"order: {given!r} was given; an order of {', '.join(map(repr, allowed))} is allowed")
    return tuple(given)
