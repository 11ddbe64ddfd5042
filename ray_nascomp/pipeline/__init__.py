"""The stages of a plan, carried out in order on a candidate."""

from ray_nascomp.pipeline.run import CompressionRun, Step, compress, compress_steps

__all__ = ["CompressionRun", "Step", "compress", "compress_steps"]
