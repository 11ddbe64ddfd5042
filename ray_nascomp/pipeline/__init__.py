"""The stages of a plan, carried out in order on a candidate."""

from ray_nascomp.pipeline.run import CompressionRun, Step, compress, compress_steps
from ray_nascomp.pipeline.stage_cache import StageCache

__all__ = ["CompressionRun", "StageCache", "Step", "compress", "compress_steps"]
