"""From a searcher's config to a validated plan: one frozen dataclass a stage.

A missing key means the identity (nothing pruned, 32 bits). An unknown key inside our stages is
an error; keys outside them pass through untouched.
"""

from ray_nascomp.plan.checks import ALL
from ray_nascomp.plan.plan import CONTINUE_FROM, CompressionPlan
from ray_nascomp.plan.stages import (
    DistillStage,
    FinetuneStage,
    LowRankStage,
    PruneStage,
    QuantizeStage,
    bits_of,
    prune_methods,
    quantize_methods,
)

__all__ = [
    "ALL",
    "CONTINUE_FROM",
    "CompressionPlan",
    "DistillStage",
    "FinetuneStage",
    "LowRankStage",
    "PruneStage",
    "QuantizeStage",
    "bits_of",
    "prune_methods",
    "quantize_methods",
]
