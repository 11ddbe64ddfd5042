"""Bytes that nodes and tensors take in an ONNX file, told without making one.

An ONNX file is a protocol buffer: a tag, a length and a content for each name, tensor and node,
lengths and integers in as many groups of seven bits as they need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SHORT = 2
"""Letters of the names that `deployment.compact` gives to whatever is not a weight."""


def varint(value: Any) -> Any:
    """Bytes of an integer, 0 or more; of each element of an array."""
    if isinstance(value, np.ndarray):
        return 1.0 + (value >= 1 << 7) + (value >= 1 << 14) + (value >= 1 << 21) + (value >= 1 << 28)
    return max(1, -(-int(value).bit_length() // 7))


def entry(content: Any) -> Any:
    """Bytes of a field whose content has a length: with its tag and that length."""
    return 1 + varint(content) + content


def tensor(name: Any, shape: Sequence[Any], content: Any, short_axes: Any = 0) -> Any:
    """Bytes of a constant in a graph.

    Args:
        name: Letters of its name.
        shape: Its shape; elements may be arrays, as all arguments.
        content: Bytes of its values.
        short_axes: How many further axes it has, each shorter than 128.
    """
    data_type = 2
    axes = sum(1 + varint(size) for size in shape) + 2 * short_axes
    return entry(axes + data_type + entry(name) + entry(content))


def scalar(content: int) -> int:
    """Bytes of a constant of one element without axes."""
    return int(tensor(SHORT, [], content))


def node(operator: str, names: Sequence[Any], attributes: Any = 0) -> Any:
    """Bytes of a node in a graph.

    Args:
        operator: Its kind.
        names: Letters of each input's and output's name.
        attributes: Bytes of its attributes.
    """
    return entry(sum(map(entry, names)) + entry(len(operator)) + attributes)


def attribute(name: str, value: float | str | Sequence[int]) -> int:
    """Bytes of an attribute of a node."""
    kind = 3
    if isinstance(value, str):
        content = entry(len(value))
    elif isinstance(value, float):
        content = 5
    elif isinstance(value, int):
        content = 1 + (varint(value) if value >= 0 else 10)
    else:
        content = sum(1 + varint(element) for element in value)
    return int(entry(entry(len(name)) + kind + content))
