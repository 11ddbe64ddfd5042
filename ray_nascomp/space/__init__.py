"""Search spaces: Tune domains with what compression knows about them."""

from ray_nascomp.space.dimensions import Dimension, Role, bits, rank, sparsity, when
from ray_nascomp.space.encoding import Space

__all__ = ["Dimension", "Role", "Space", "bits", "rank", "sparsity", "when"]
