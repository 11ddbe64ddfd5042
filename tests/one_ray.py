"""Tests in several processes, all that start Ray in one of them: two instances would fight over the same CPUs."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

_WHOLE_FILE = re.compile(r"\bstarts_ray\b|usefixtures\(\"ray_session\"\)")


class OneRay(LoadScopeScheduling):
    """Sends the tests that start Ray to one process, and every other wherever one is free."""

    def _split_scope(self, nodeid: str) -> str:
        file, *_, name = nodeid.split("[")[0].split("::")
        starting = tests_that_start_ray(self.config.rootpath / file)
        return "ray" if starting is None or name in starting else nodeid


@cache
def tests_that_start_ray(file: Path) -> frozenset[str] | None:
    """Names of a file's tests that take the fixture; None for all, where a mark or another fixture of the file does."""
    text = file.read_text()
    if _WHOLE_FILE.search(text):
        return None
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    taking = {function.name for function in functions if "ray_session" in {each.arg for each in function.args.args}}
    return frozenset(taking) if all(name.startswith("test_") for name in taking) else None
