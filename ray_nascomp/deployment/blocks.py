"""Products by weights of 4 bits in ONNX Runtime's own operator, MatMulNBits.

Inputs are rounded to 8 bits as they come, a block at a time. Measured (`benchmarks/matmul_nbits.py`),
that is faster than floating point and than what is unfolded at load: twice and more for a single
token, 1.4 to 1.8 times at 32 and more; the outputs differ by a percent after four layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

BLOCK_DOMAIN = "com.microsoft"
_ZERO = 8
_BITS = 4
_IN_INTEGERS = 4
"""The accuracy level at which the operator computes in integers."""


def pack_blocks(integers: np.ndarray, size: int) -> np.ndarray:
    """Integers as the operator reads them: two a byte, the first in the lower half, zero stored as 8.

    Args:
        integers: Values in -7..7, shape `(outputs, inputs)`.
        size: Inputs of a block.

    Returns:
        Shape `(outputs, blocks, size / 2)`, uint8; the last block is filled up with zeros.
    """
    outputs, inputs = integers.shape
    blocks = -(-inputs // size)
    padded = np.pad(integers.astype(np.int16) + _ZERO, ((0, 0), (0, blocks * size - inputs)), constant_values=_ZERO)
    pairs = padded.astype(np.uint8).reshape(outputs, blocks, size // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << np.uint8(_BITS)


def block_product(node: onnx.NodeProto, weight: str, scales: str, shape: tuple[int, ...], size: int) -> onnx.NodeProto:
    """The operator in the place of a MatMul.

    Args:
        node: The MatMul.
        weight: Name of the packed integers.
        scales: Name of the blocks' scales.
        shape: Outputs and inputs.
        size: Inputs of a block.
    """
    outputs, inputs = shape
    options: dict[str, Any] = {
        "K": inputs,
        "N": outputs,
        "bits": _BITS,
        "block_size": size,
        "accuracy_level": _IN_INTEGERS,
    }
    return helper.make_node(
        "MatMulNBits", [node.input[0], weight, scales], list(node.output), domain=BLOCK_DOMAIN, **options
    )
