"""From a searcher's config to a validated plan: one frozen dataclass a stage.

A missing key means the identity (nothing pruned, 32 bits). An unknown key inside our stages is
an error; keys outside them pass through untouched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_nascomp.errors import ConfigError

if TYPE_CHECKING:
    from ray_nascomp.model_spec import ModelSpec

PRUNE_METHODS = ("l1_norm", "l2_norm", "fpgm", "taylor", "level")
QUANTIZE_METHODS = ("ptq", "qat")
BITS = (8, 32)
"""Bits that the quantizers offer; 32 leaves a layer in floating point."""

ALL = "*"
"""Key that stands for every group or layer that is not named."""


@dataclass(frozen=True)
class PruneStage:
    """What to prune.

    Attributes:
        method: One of `PRUNE_METHODS`; "level" removes single weights, the others channels.
        sparsity: Group name, or "*" for all others -> share of channels (or weights) to remove, in [0, 1).
        round_to: Channels that are left come in multiples of this, 1 or more; runtimes are fast at
            multiples of 8 or 16.
    """

    method: str = "l1_norm"
    sparsity: Mapping[str, float] = field(default_factory=dict)
    round_to: int = 1

    def of(self, group: str) -> float:
        """Sparsity of a group."""
        return self.sparsity.get(group, self.sparsity.get(ALL, 0.0))

    @property
    def is_identity(self) -> bool:
        """Whether nothing is pruned."""
        return not any(self.sparsity.values())


@dataclass(frozen=True)
class DistillStage:
    """Distillation from the task's own model (Hinton et al. 2015, arXiv 1503.02531).

    Attributes:
        weight: Share of the distillation loss in the whole, in [0, 1].
        temperature: Softening of the logits, positive.
    """

    weight: float = 0.0
    temperature: float = 2.0


@dataclass(frozen=True)
class FinetuneStage:
    """How the compressed model is trained on.

    Attributes:
        lr: Peak learning rate of AdamW, positive.
        weight_decay: Decoupled weight decay.
        distill: Distillation during the training.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-2
    distill: DistillStage = field(default_factory=DistillStage)


@dataclass(frozen=True)
class QuantizeStage:
    """What to quantize.

    Attributes:
        method: "ptq" (after training) or "qat" (the last quarter of the epochs trains with it).
        bits: Layer name, or "*" for all others -> 8 or 32.
    """

    method: str = "ptq"
    bits: Mapping[str, int] = field(default_factory=dict)

    def of(self, layer: str) -> int:
        """Bits of a layer."""
        return self.bits.get(layer, self.bits.get(ALL, 32))

    @property
    def is_identity(self) -> bool:
        """Whether every layer stays in floating point."""
        return all(bits == 32 for bits in self.bits.values())


@dataclass(frozen=True)
class CompressionPlan:
    """A validated config.

    Attributes:
        architecture: What the user's builder is called with; empty for the task's own model.
        prune: Pruning.
        finetune: Training of the compressed model, with distillation.
        quantize: Quantization.
        extra: Keys of the config that are not ours.
    """

    architecture: Mapping[str, Any] = field(default_factory=dict)
    prune: PruneStage = field(default_factory=PruneStage)
    finetune: FinetuneStage = field(default_factory=FinetuneStage)
    quantize: QuantizeStage = field(default_factory=QuantizeStage)
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
        groups = [group.name for group in spec.prunable_groups]
        layers = [layer.name for layer in spec.compressible_layers]
        known = {stage.name for stage in dataclasses.fields(cls)} - {"extra"}
        return cls(
            architecture=dict(_mapping(config.get("architecture", {}), "architecture")),
            prune=_prune(_mapping(config.get("prune", {}), "prune"), groups),
            finetune=_finetune(_mapping(config.get("finetune", {}), "finetune")),
            quantize=_quantize(_mapping(config.get("quantize", {}), "quantize"), layers),
            extra={key: value for key, value in config.items() if key not in known},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values."""
        return dataclasses.asdict(self)

    def canonical(self) -> dict[str, Any]:
        """Plain values in which whatever does not matter is left out: equal plans, equal values."""
        plan = {"architecture": dict(self.architecture), "extra": dict(self.extra)}
        if not self.prune.is_identity:
            sparsity = {
                name: value for name, value in self.prune.sparsity.items() if value or ALL in self.prune.sparsity
            }
            plan["prune"] = {"method": self.prune.method, "sparsity": sparsity, "round_to": self.prune.round_to}
        finetune = dataclasses.asdict(self.finetune)
        if not self.finetune.distill.weight:
            del finetune["distill"]
        plan["finetune"] = finetune
        if not self.quantize.is_identity:
            bits = {
                name: value for name, value in self.quantize.bits.items() if value != 32 or ALL in self.quantize.bits
            }
            plan["quantize"] = {"method": self.quantize.method, "bits": bits}
        return plan

    @property
    def seed(self) -> int:
        """A seed that equal plans share, 32 bits."""
        text = json.dumps(self.canonical(), sort_keys=True, default=str)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: {value!r} was given, a dict is allowed")
    return value


def _check_keys(section: Mapping[str, Any], stage: type, key: str) -> None:
    allowed = [f.name for f in dataclasses.fields(stage)]
    for name in section:
        if name not in allowed:
            raise ConfigError.unknown(key, name, allowed)


def _choice(section: Mapping[str, Any], key: str, name: str, allowed: tuple[str, ...], default: str) -> str:
    value = section.get(name, default)
    if value not in allowed:
        raise ConfigError.unknown(f"{key}.{name}", value, allowed)
    return str(value)


def _per_name(value: Any, key: str, names: list[str], what: str) -> dict[str, Any]:
    """One value for all, or a dict of values by name, as a dict."""
    if not isinstance(value, Mapping):
        return {ALL: value}
    for name in value:
        if name != ALL and name not in names:
            raise ConfigError.unknown(f"{key}: {what}", name, names)
    return dict(value)


def _prune(section: Mapping[str, Any], groups: list[str]) -> PruneStage:
    _check_keys(section, PruneStage, "prune")
    sparsity = _per_name(section.get("sparsity", {}), "prune.sparsity", groups, "group")
    for name, value in sparsity.items():
        sparsity[name] = round(_number(value, f"prune.sparsity.{name}", 0.0, 1.0, include_upper=False), 9)
    round_to = section.get("round_to", PruneStage.round_to)
    if isinstance(round_to, bool) or not isinstance(round_to, numbers.Integral) or round_to < 1:
        raise ConfigError(f"prune.round_to: {round_to!r} was given, a whole number of 1 or more is allowed")
    method = _choice(section, "prune", "method", PRUNE_METHODS, PruneStage.method)
    return PruneStage(method, sparsity, int(round_to))


def _finetune(section: Mapping[str, Any]) -> FinetuneStage:
    _check_keys(section, FinetuneStage, "finetune")
    distill = _mapping(section.get("distill", {}), "finetune.distill")
    _check_keys(distill, DistillStage, "finetune.distill")
    return FinetuneStage(
        lr=_number(section.get("lr", FinetuneStage.lr), "finetune.lr", 0.0, math.inf, include_lower=False),
        weight_decay=_number(
            section.get("weight_decay", FinetuneStage.weight_decay), "finetune.weight_decay", 0.0, math.inf
        ),
        distill=DistillStage(
            weight=_number(distill.get("weight", DistillStage.weight), "finetune.distill.weight", 0.0, 1.0),
            temperature=_number(
                distill.get("temperature", DistillStage.temperature),
                "finetune.distill.temperature",
                0.0,
                math.inf,
                include_lower=False,
            ),
        ),
    )


def _quantize(section: Mapping[str, Any], layers: list[str]) -> QuantizeStage:
    _check_keys(section, QuantizeStage, "quantize")
    method = _choice(section, "quantize", "method", QUANTIZE_METHODS, QuantizeStage.method)
    bits = _per_name(section.get("bits", {}), "quantize.bits", layers, "layer")
    for name, value in bits.items():
        if isinstance(value, bool) or value not in BITS:
            raise ConfigError.unknown(f"quantize.bits.{name} with method {method!r}", value, BITS)
        bits[name] = int(value)
    return QuantizeStage(method, bits)


def _number(
    value: Any, key: str, lower: float, upper: float, include_lower: bool = True, include_upper: bool = True
) -> float:
    inside = False
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value):
        number = float(value)
        above = number >= lower if include_lower else number > lower
        below = number <= upper if include_upper else number < upper
        inside = above and below and math.isfinite(number)
    if not inside:
        left, right = "[" if include_lower else "(", "]" if include_upper and math.isfinite(upper) else ")"
        raise ConfigError(f"{key}: {value!r} was given, a number in {left}{lower:g}, {upper:g}{right} is allowed")
    return float(value)
