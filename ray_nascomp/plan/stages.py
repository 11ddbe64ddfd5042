"""The stages of a plan: one frozen dataclass each, made from its section of a config."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_nascomp import registry
from ray_nascomp.errors import ConfigError
from ray_nascomp.plan.checks import ALL, all_numbers, check_keys, choice, mapping, number, per_name, whole
from ray_nascomp.pruners import CHANNEL_METHODS, SCHEDULES, WEIGHT_METHODS, schedule_refusal
from ray_nascomp.quantizers import QUANTIZER_BITS, refusal

LAYERWISE = ("none", "dynamic", "adaptive1d")


def prune_methods() -> tuple[str, ...]:
    """Names that `prune.method` takes."""
    return (*CHANNEL_METHODS, *WEIGHT_METHODS, *registry.registered("pruner"))


def quantize_methods() -> tuple[str, ...]:
    """Names that `quantize.method` takes."""
    return (*QUANTIZER_BITS, *registry.registered("quantizer"))


def bits_of(method: str) -> tuple[int, ...]:
    """Bits that a quantizer offers, ascending; 32 leaves a layer in floating point."""
    if method in QUANTIZER_BITS:
        return (*sorted(QUANTIZER_BITS[method]), 32)
    return (*sorted(registry.registered("quantizer")[method].bits), 32)


@dataclass(frozen=True)
class PruneStage:
    """What to prune.

    Attributes:
        method: One of `prune_methods()`: "level", "movement_level" and "2:4" (of linear layers, Mishra
            et al. 2021, arXiv 2104.08378) set single weights to zero, the others remove channels
            and attention heads.
        sparsity: Group name, or "*" for all others -> share of channels, heads or weights to
            remove, in [0, 1).
        scope: "group": each group loses its own share; "global": the sparsity "*" is a share of all
            groups' units together, the least important ones by the method's own scores, as multiples of
            their mean in the group.
        schedule: "one_shot", or gradually while the network is trained for an epoch: "linear", or
            "agp" (Zhu and Gupta 2017, arXiv 1710.01878), or "fused": as "agp", in NNI's one run
            with distillation and the plan's quantizer.
        round_to: Channels that are left come in multiples of this, 1 or more; runtimes are fast at
            multiples of 8 or 16.
    """

    method: str = "l1_norm"
    sparsity: Mapping[str, float] = field(default_factory=dict)
    scope: str = "group"
    schedule: str = "one_shot"
    round_to: int = 1

    @classmethod
    def from_section(cls, section: Mapping[str, Any], groups: Collection[str]) -> PruneStage:
        """Checks a config's section.

        Raises:
            ConfigError: For an unknown key, group or method, or a value that is not allowed.
        """
        check_keys(section, cls, "prune")
        sparsity = per_name(section.get("sparsity", {}), "prune.sparsity", groups, "group")
        sparsity = all_numbers(sparsity, "prune.sparsity", 0.0, 1.0, include_upper=False)
        method = choice(section, "prune", "method", prune_methods(), cls.method)
        scope = choice(section, "prune", "scope", ("group", "global"), cls.scope)
        schedule = choice(section, "prune", "schedule", ("one_shot", *SCHEDULES, "fused"), cls.schedule)
        if scope == "global" and (set(sparsity) - {ALL} or method in WEIGHT_METHODS):
            raise ConfigError(
                f"prune.scope: 'global' was given with method {method!r} and the sparsities of "
                f"{sorted(set(sparsity) - {ALL})}; with it, one sparsity for all and a method that removes "
                "channels are allowed"
            )
        refused = schedule_refusal(method, "agp" if schedule == "fused" else schedule)
        if schedule == "one_shot":
            refused = None
        if refused is not None:
            raise ConfigError(f"prune.schedule: {schedule!r} was given with method {method!r}; {refused}")
        return cls(method, sparsity, scope, schedule, whole(section.get("round_to", cls.round_to), "prune.round_to"))

    def of(self, group: str) -> float:
        """Sparsity of a group."""
        return self.sparsity.get(group, self.sparsity.get(ALL, 0.0))

    @property
    def removes_units(self) -> bool:
        """Whether whole channels and heads are removed."""
        return self.method not in WEIGHT_METHODS

    @property
    def is_identity(self) -> bool:
        """Whether nothing is pruned."""
        return not any(self.sparsity.values())


@dataclass(frozen=True)
class LowRankStage:
    """Which layers become products of thinner ones.

    Linear layers and embeddings by singular values, weighted by what goes into the layer; convolutions by
    Tucker-2 (Kim et al. 2016, arXiv 1511.06530).

    Attributes:
        rank: Layer name, or "*" for all others -> share of the largest rank that saves parameters,
            in (0, 1]; 1 leaves the layer as it is.
        energy: Instead of ranks: share of each layer's squared singular values to keep, in (0, 1).
        round_to: Ranks come in multiples of this.
    """

    rank: Mapping[str, float] = field(default_factory=dict)
    energy: float | None = None
    round_to: int = 1

    @classmethod
    def from_section(cls, section: Mapping[str, Any], layers: Collection[str]) -> LowRankStage:
        """Checks a config's section.

        Raises:
            ConfigError: For an unknown key or layer, or a value that is not allowed.
        """
        check_keys(section, cls, "low_rank")
        rank = per_name(section.get("rank", {}), "low_rank.rank", layers, "layer")
        rank = all_numbers(rank, "low_rank.rank", 0.0, 1.0, include_lower=False)
        energy = section.get("energy")
        if energy is not None:
            if rank:
                raise ConfigError("low_rank: rank and energy were given, one of them is allowed")
            energy = number(energy, "low_rank.energy", 0.0, 1.0, include_lower=False)
        return cls(rank, energy, whole(section.get("round_to", cls.round_to), "low_rank.round_to"))

    def of(self, layer: str) -> float:
        """A layer's rank, as a share."""
        return self.rank.get(layer, self.rank.get(ALL, 1.0))

    @property
    def is_identity(self) -> bool:
        """Whether no layer is factorised."""
        return self.energy is None and all(value == 1 for value in self.rank.values())


@dataclass(frozen=True)
class DistillStage:
    """Distillation from the task's teacher (Hinton et al. 2015, arXiv 1503.02531).

    Attributes:
        weight: Share of the distillation loss in the whole, in [0, 1].
        temperature: Softening of the logits, positive.
        noise: Denoising distillation: the student sees noised inputs, the teacher clean ones.
            Standard deviations of noise on real inputs; share of replaced tokens in token inputs.
        layers: NNI's layer-wise distillation of the outputs of layers: "none", "dynamic" or
            "adaptive1d".
    """

    weight: float = 0.0
    temperature: float = 2.0
    noise: float = 0.0
    layers: str = "none"

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> DistillStage:
        """Checks a config's section.

        Raises:
            ConfigError: For an unknown key, or a value that is not allowed.
        """
        key = "finetune.distill"
        check_keys(section, cls, key)
        return cls(
            weight=number(section.get("weight", cls.weight), f"{key}.weight", 0.0, 1.0),
            temperature=number(
                section.get("temperature", cls.temperature), f"{key}.temperature", 0.0, math.inf, include_lower=False
            ),
            noise=number(section.get("noise", cls.noise), f"{key}.noise", 0.0, 1.0),
            layers=choice(section, key, "layers", LAYERWISE, cls.layers),
        )


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

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> FinetuneStage:
        """Checks a config's section.

        Raises:
            ConfigError: For an unknown key, or a value that is not allowed.
        """
        check_keys(section, cls, "finetune")
        return cls(
            lr=number(section.get("lr", cls.lr), "finetune.lr", 0.0, math.inf, include_lower=False),
            weight_decay=number(section.get("weight_decay", cls.weight_decay), "finetune.weight_decay", 0.0, math.inf),
            distill=DistillStage.from_section(mapping(section.get("distill", {}), "finetune.distill")),
        )


@dataclass(frozen=True)
class QuantizeStage:
    """What to quantize.

    Attributes:
        method: One of `quantize_methods()`; all but "ptq" and users' own train with simulated integers.
        bits: Layer name, or "*" for all others -> bits that the method offers, or 32.
        budget: Instead of bits (`bits: "adaptive"`): share of the bytes of the layers' weights in
            floating point that may be used, in (0, 1]; bits are given by measured sensitivity.
        start: Share of the fine-tuning after which training with simulated integers begins, in
            [0, 1]; 0 trains with them from the start. At least one epoch is trained so.
    """

    method: str = "ptq"
    bits: Mapping[str, int] = field(default_factory=dict)
    budget: float | None = None
    start: float = 0.75

    @classmethod
    def from_section(cls, section: Mapping[str, Any], layers: Collection[str]) -> QuantizeStage:
        """Checks a config's section.

        Raises:
            ConfigError: For an unknown key, layer or method, or bits that the method does not offer.
        """
        check_keys(section, cls, "quantize")
        method = choice(section, "quantize", "method", quantize_methods(), cls.method)
        start = number(section.get("start", cls.start), "quantize.start", 0.0, 1.0)
        budget, given = section.get("budget"), section.get("bits", {})
        if given == "adaptive":
            if budget is None:
                raise ConfigError("quantize.budget: none was given with bits 'adaptive'; a number in (0, 1] is needed")
            budget = number(budget, "quantize.budget", 0.0, 1.0, include_lower=False)
            return cls(method, {}, budget, start)
        if budget is not None:
            raise ConfigError(
                f"quantize.budget: {budget!r} was given with bits {given!r}; it goes with bits 'adaptive'"
            )
        bits = per_name(given, "quantize.bits", layers, "layer")
        allowed = bits_of(method)
        for name, value in bits.items():
            if type(value) is int and value in allowed:
                continue
            if isinstance(value, bool) or value not in allowed:
                reason = refusal(method, value)
                key = f"quantize.bits.{name} with method {method!r}"
                raise ConfigError.unknown(key if reason is None else f"{key} ({reason})", value, allowed)
            bits[name] = int(value)
        return cls(method, bits, None, start)

    def of(self, layer: str) -> int:
        """Bits of a layer."""
        return self.bits.get(layer, self.bits.get(ALL, 32))

    @property
    def trains(self) -> bool:
        """Whether the method trains with simulated integers."""
        return self.method in QUANTIZER_BITS and self.method != "ptq"

    @property
    def is_identity(self) -> bool:
        """Whether every layer stays in floating point."""
        return self.budget is None and all(bits == 32 for bits in self.bits.values())
