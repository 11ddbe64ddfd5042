from __future__ import annotations

import pytest
from results.test_results import row, write_trial

import ray_nascomp as nc


@pytest.mark.parametrize(("counts", "told"), [({"cache_hits": 3, "cache_misses": 1}, "75% of the trials"), ({}, None)])
def test_the_report_tells_what_the_stage_cache_was_worth(tmp_path, counts, told):
    write_trial(tmp_path / "x", "one", [row(0.9, 2.0, seconds_prune=1.0, **counts)])
    text = nc.Results(tmp_path / "x").report(tmp_path / "report.html").read_text()
    assert ("stage cache" in text) == (told is not None)
    assert told is None or told in text
