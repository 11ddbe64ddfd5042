"""Runs `search_process.py` in processes of its own, kills them, and says what was computed when."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from search_process import GOAL, SPACE, STEPS, evaluate

from ray_nascomp.observation_log import Record
from ray_nascomp.results import Results
from ray_nascomp.searchers import EvolutionarySearch

SCRIPT = Path(__file__).with_name("search_process.py")


class KilledSearch:
    """A search whose driver is killed again and again.

    Args:
        root: A folder for everything.
        options: Options of `search_process.py`.
    """

    def __init__(self, root: Path, **options: float) -> None:
        self.root = root
        self.experiment = root / "first" / "run"
        self.computed = root / "computed"
        self.options = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self.finished_at_kills: list[tuple[int, set[str]]] = []
        root.mkdir(parents=True, exist_ok=True)

    def records(self) -> list[Record]:
        """The observation log as it is now."""
        texts = [path.read_text() for path in self.experiment.glob("observation-*.json")]
        return [record for record in map(Record.from_json, texts) if record is not None]

    def steps(self) -> list[tuple[str, int]]:
        """Config and step of all that was computed, in order."""
        lines = self.computed.read_text().splitlines() if self.computed.exists() else []
        return [(entry["config"], entry["step"]) for entry in map(json.loads, lines)]

    def results(self) -> list[dict]:
        """Tune's results at the end."""
        return json.loads(Path(f"{self.computed}.results.json").read_text())

    def state(self) -> list[dict]:
        """The searcher's observations at the end."""
        path = max(self.experiment.glob("searcher-state-*.pkl"))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line["observation"] for line in lines if "observation" in line]

    def run(self, how: str) -> None:
        """Runs to the end."""
        process = self._start(how)
        assert process.wait(timeout=200) == 0, Path(f"{self.computed}.log").read_text()[-3000:]

    def run_until_killed(self, rng: random.Random, most: int) -> bool:
        """Starts or restores, and kills at a random moment; False if it was through before."""
        was_started = (self.experiment / "tuner.pkl").exists()
        process = self._start("restore" if was_started else "start")
        count = rng.randint(0, most)
        if count:
            target = len(self.records()) + count
            while process.poll() is None and len(self.records()) < target:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(1, 10))
        was_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        # A result whose file was not saved yet is kept, but its file has to be made again.
        whole = [r for r in self.records() if r.is_ended and r.checkpoint_iteration == max(r.reports)]
        finished = {json.dumps(record.config, sort_keys=True) for record in whole}
        self.finished_at_kills.append((len(self.steps()), finished))
        return was_running

    def move(self) -> None:
        """Moves the storage elsewhere; the old place is gone."""
        target = self.root / "second" / "moved"
        target.parent.mkdir()
        shutil.move(self.experiment, target)
        shutil.rmtree(self.experiment.parent)
        self.experiment = target

    def assert_nothing_lost(self, trials: int) -> None:
        """Every finished result is there, was computed once, and was told to the searcher once."""
        steps = self.steps()
        for position, finished in self.finished_at_kills:
            again = {config for config, _ in steps[position:]} & finished
            assert not again, f"computed again after a kill: {again}"
        results = [json.dumps(result["config"], sort_keys=True) for result in self.results()]
        told = [json.dumps(entry["config"], sort_keys=True) for entry in self.state()]
        assert len(results) == trials
        assert max(Counter(results).values()) == max(Counter(told).values()) == 1
        assert set(results) == set(told)
        for _, finished in self.finished_at_kills:
            assert finished <= set(results)
        read = Results(self.experiment, GOAL).trials
        assert sorted(json.dumps(dict(trial.config), sort_keys=True) for trial in read) == sorted(results)
        assert {trial.status for trial in read} == {"completed"}

    def _start(self, how: str) -> subprocess.Popen:
        cwd = self.root / f"cwd{len(self.finished_at_kills)}"
        cwd.mkdir(exist_ok=True)
        command = [sys.executable, str(SCRIPT), str(self.experiment), how, "--computed", str(self.computed)]
        with open(f"{self.computed}.log", "a") as log:
            return subprocess.Popen(
                [*command, *self.options], cwd=cwd, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": ""}
            )


def quiet_sequence(trials: int) -> list[dict]:
    """The configs that a search without faults suggests, one trial at a time."""
    searcher = EvolutionarySearch(GOAL, seed=7)
    searcher.set_search_properties(None, None, dict(SPACE))
    for number in range(trials):
        config = searcher.suggest(f"{number}")
        searcher.on_trial_complete(f"{number}", {**evaluate(config), "final": True, "training_iteration": STEPS})
    return [dict(observation.config) for observation in searcher.observations]
