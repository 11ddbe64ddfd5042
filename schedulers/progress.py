"""How far a trial is, by the measure that its reports have."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import as_float
from ray_nascomp.observations import reported_names

logger = logging.getLogger(__name__)


class Progress:
    """Reads a report's measure of progress; says once that a report has none.

    Args:
        time_attr: The measure's name.

    Raises:
        ConfigError: If it is no name.
    """

    def __init__(self, time_attr: str) -> None:
        if not isinstance(time_attr, str) or not time_attr:
            raise ConfigError(f"time_attr: {time_attr!r} was given, the name of a reported number is allowed")
        self._name = time_attr
        self._has_warned = False

    def of(self, result: Mapping[str, Any]) -> float:
        """The value in a report; NaN if it has no such number."""
        time = as_float(result.get(self._name))
        if math.isnan(time) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "time_attr: %r is no number in a report, of which the scheduler knows nothing then; reported: %s",
                self._name,
                reported_names(result),
            )
        return time
