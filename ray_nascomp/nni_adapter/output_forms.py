"""Scales of layers' outputs with which what follows them computes in integers, too."""

from __future__ import annotations

import math
from typing import Literal

from ray_nascomp.nni_adapter.scales import ActivationScale

OutputForm = Literal["plain", "positive", "hard_sigmoid", "hard_swish"]
"""What reads an output: anything; a ReLU alone; a hard sigmoid, clip((x + 3) / 6, 0, 1); x times that."""

HARD_LIMIT, HARD_SLOPE = 3, 6

_COARSEST = 1.5
"""Where HardSwish's integers would be so many times as coarse as its input's, it stays in floating point."""
_COARSEST_GATE = HARD_SLOPE / 127
"""A sigmoid lies within 0..1: 127 steps of it are enough at any rate."""
_WHOLE = 1e-3


def fitted(scale: ActivationScale, form: OutputForm) -> ActivationScale:
    """The scale nearest to an observed one that a form asks for; the same where that would be too coarse.

    Args:
        scale: Observed.
        form: What reads the output.
    """
    if form == "plain":
        return scale
    upper = (255 - scale.zero_point) * scale.scale
    if form == "positive":
        return ActivationScale(max(upper, scale.scale) / 255, 0)
    lower = max(HARD_LIMIT, scale.zero_point * scale.scale)
    step = max(scale.scale, (upper + lower) / 255)
    step = HARD_LIMIT / max(1, math.floor(HARD_LIMIT / step + _WHOLE))
    if step > max(_COARSEST * scale.scale, _COARSEST_GATE if form == "hard_sigmoid" else 0):
        return scale
    return ActivationScale(step, max(scale.zero_point, round(HARD_LIMIT / step)))


def hard_steps(scale: ActivationScale) -> int | None:
    """Steps from 0 to the limits of a hard sigmoid; None where they are not whole, or do not reach the lower limit."""
    steps = HARD_LIMIT / scale.scale
    is_whole = abs(steps - round(steps)) < _WHOLE * steps
    return round(steps) if is_whole and round(steps) <= scale.zero_point else None
