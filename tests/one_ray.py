"""Tests in several processes, all that start Ray in one of them: two instances would fight over the same CPUs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

_STARTS_RAY = re.compile(r"\bray_session\b|\bstarts_ray\b")


class OneRay(LoadScopeScheduling):
    """Sends the files that start Ray to one process, and every other test wherever one is free."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if starts_ray(self.config.rootpath / nodeid.split("::")[0]) else nodeid


@cache
def starts_ray(file: Path) -> bool:
    """Whether a file of tests says that it does, by the fixture or by the marker."""
    return bool(_STARTS_RAY.search(file.read_text()))
