from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from ray_nascomp.deployment.elsewhere import timer_elsewhere
from ray_nascomp.errors import ConfigError

pytestmark = pytest.mark.starts_ray


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    script = Path(__file__).with_name("cluster_process.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=540, cwd=folder
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("FACTS ")]
    assert lines, ended.stdout[-2000:] + ended.stderr[-4000:]
    return json.loads(lines[0].removeprefix("FACTS "))


@pytest.mark.slow
def test_all_trials_finish_once_while_one_node_goes_and_another_comes(facts):
    assert facts["statuses"] == ["TERMINATED"] * 24
    assert facts["last"] == [3] * 24
    assert len({json.dumps(config, sort_keys=True) for config in facts["configs"]}) == 24
    last_steps = Counter(json.dumps(s["config"], sort_keys=True) for s in facts["steps"] if s["step"] == 3)
    # What ran on the dead node, two trials at most, may have lost a last step that was not reported yet.
    assert set(last_steps) == {json.dumps(config, sort_keys=True) for config in facts["configs"]}
    assert sum(last_steps.values()) <= 26
    used = {step["node"] for step in facts["steps"]}
    assert facts["removed"] in used
    assert facts["added"] in used
    assert len(used) == 4


@pytest.mark.slow
def test_a_bigger_candidate_gets_more_processors(facts):
    cpus = {step["config"]["width"] > 0.7: set() for step in facts["steps"]}
    for step in facts["steps"]:
        cpus[step["config"]["width"] > 0.7].add(step["cpus"])
    assert cpus == {True: {2}, False: {1}}


@pytest.mark.slow
def test_measurements_run_on_the_node_that_they_are_for_one_at_a_time(facts):
    spans = sorted(step["measured"][1:] for step in facts["steps"])
    assert {step["measured"][0] for step in facts["steps"]} == {facts["edge"]}
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_a_timer_without_a_resource_is_refused():
    with pytest.raises(ConfigError, match=r"latency_resources: \{\} was given"):
        timer_elsewhere({})


@pytest.mark.minutes
def test_the_example_searches_and_started_again_goes_on(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "cluster" / "search.py"

    def run(trials: int) -> str:
        options = ["--storage", str(tmp_path / "storage"), "--trials", str(trials), "--epochs", "2"]
        ended = subprocess.run(
            [sys.executable, str(script), *options], capture_output=True, text=True, timeout=400, cwd=tmp_path
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        return next(line for line in ended.stdout.splitlines() if line.startswith("Results("))

    first = run(4)
    assert "4 trials" in first
    assert run(4) == first
