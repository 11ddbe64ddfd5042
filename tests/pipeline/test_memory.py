from __future__ import annotations

import ctypes
import sys

import numpy as np
import psutil
import pytest

from ray_nascomp.pipeline.memory import return_freed_memory

HAS_TRIM = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not HAS_TRIM, reason="the C library has no malloc_trim")
def test_what_was_freed_between_living_blocks_is_given_back():
    process = psutil.Process()
    # Small enough for the heap; what survives keeps glibc from giving back what is below.
    blocks = [np.ones(8_000, np.uint8) for _ in range(50_000)]
    kept = blocks[::1000]
    del blocks
    before = process.memory_info().rss
    return_freed_memory()
    assert before - process.memory_info().rss > 200e6
    assert len(kept) == 50
