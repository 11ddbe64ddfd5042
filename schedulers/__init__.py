"""Trial schedulers over several objectives with constraints, for any Ray Tune trainable."""

from ray.tune.schedulers import SCHEDULER_IMPORT

from ray_nascomp.schedulers.compression_pbt import CompressionPBTScheduler
from ray_nascomp.schedulers.feasibility import FeasibilityScheduler
from ray_nascomp.schedulers.pareto_asha import ParetoASHAScheduler

__all__ = ["CompressionPBTScheduler", "FeasibilityScheduler", "ParetoASHAScheduler"]

SCHEDULER_IMPORT["compression_pbt"] = CompressionPBTScheduler
SCHEDULER_IMPORT["feasibility"] = FeasibilityScheduler
SCHEDULER_IMPORT["pareto_asha"] = ParetoASHAScheduler
