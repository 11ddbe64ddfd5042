"""Where a model's layers stand in its exported file, as far as the file's size depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerPlace:
    """A layer in the file of the model as it is.

    Attributes:
        operator: Name of its node's operator; "" if it is not known.
        input: Number of the tensor that it reads; layers that read the same one have the same number.
        is_positive: Whether that tensor has no values below 0.
        followers: Names of the layers that read its output; None where something else does, too.
        nodes: How many nodes it has; stacked recurrent layers have several.
        gates: Operators of the sigmoids of its output that are quantized together with it.
        products: How many products with these are.
    """

    operator: str = ""
    input: int = -1
    is_positive: bool = False
    followers: tuple[str, ...] | None = None
    nodes: int = 1
    gates: tuple[str, ...] = ()
    products: int = 0


@dataclass(frozen=True)
class FileLayout:
    """The file of a model as it is.

    Attributes:
        size: Its bytes; None if it was not made.
        places: Layer name -> its place.
        is_smoothed: Whether inputs of linear layers are smoothed before they are quantized, as those of
            transformers are.
        shared_rows: Bytes of what tells tokens their rows, where several share one.
    """

    size: int | None = None
    places: Mapping[str, LayerPlace] = field(default_factory=dict)
    is_smoothed: bool = False
    shared_rows: int = 0


def block_size(columns: int) -> int | None:
    """Inputs that share a scale where ONNX Runtime multiplies by 4 bits itself; None where it does not.

    Args:
        columns: Inputs of the layer. Blocks are as large as waste no more than a twentieth.
    """
    if columns < _LEAST_COLUMNS:
        return None
    return next((size for size in BLOCK_SIZES if -(-columns // size) * size <= _WASTE * columns), None)


BLOCK_SIZES = (128, 64, 32)
_LEAST_COLUMNS = 128
_WASTE = 1.05
