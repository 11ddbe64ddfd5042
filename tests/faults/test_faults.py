"""The table of faults in docs/faults.md: each row one trial of one search, and what its user sees."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ray import tune

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.recorded import recorded
from ray_nascomp.time_limit import deadline, time_limited

GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("size", "min")])
STEPS = 3
FAULTS = {
    "none": ("completed", ""),
    "killed once": ("completed", ""),
    "killed always": ("failed", "died"),
    "damaged checkpoint": ("completed", ""),
    "raises": ("failed", "division by zero"),
    "out of memory": ("failed", "Unable to allocate"),
    "hangs": ("failed", "longer than its limit of 3 s, in step 2"),
    "full disk": ("failed", "No space left on device"),
    "nan": ("failed", "accuracy=nan: finite numbers are needed"),
    "wrong type": ("failed", "accuracy='high': finite numbers are needed"),
    "missing": ("failed", "accuracy=None: finite numbers are needed"),
}


class Faulty(tune.Trainable):
    def setup(self, config, folder):
        self._folder = Path(folder)
        self.reset_config(config)

    def reset_config(self, new_config):
        self._fault, self._position = new_config["fault"], 0
        return True

    def step(self):
        if self._position == STEPS:
            return {"__duplicate__": True, "done": True}
        with open(self._folder / f"computed {self._fault}", "a") as file:
            file.write(f"{self._position + 1}\n")
        if self._position == 1:
            self._fail()
        self._position += 1
        metrics = {"accuracy": self._position / STEPS, "size": 1.0, "final": self._position == STEPS}
        wrong = {"nan": float("nan"), "wrong type": "high"}
        if self._fault in wrong:
            metrics["accuracy"] = wrong[self._fault]
        if self._fault == "missing":
            del metrics["accuracy"]
        return metrics

    def save_checkpoint(self, checkpoint_dir):
        if self._fault == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        (Path(checkpoint_dir) / "position").write_text(str(self._position))
        return checkpoint_dir

    def load_checkpoint(self, checkpoint):
        self._position = int((Path(checkpoint) / "position").read_text())

    def _fail(self):
        is_first = not (self._folder / f"failed {self._fault}").exists()
        (self._folder / f"failed {self._fault}").touch()
        if self._fault == "killed always" or (self._fault == "killed once" and is_first):
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._fault == "damaged checkpoint" and is_first:
            for path in Path(self._storage.trial_fs_path).glob("checkpoint_*/position"):
                path.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._fault == "raises":
            1 / 0  # noqa: B018
        elif self._fault == "out of memory":
            np.ones(2**50)
        elif self._fault == "hangs":
            time.sleep(1000)


@pytest.fixture(scope="module")
def faulty_search(ray_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    trainable = time_limited(recorded(Faulty), 3)
    grid = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, folder=str(folder)), {"cpu": 0.5}),
        param_space={"fault": tune.grid_search(list(FAULTS))},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(folder),
            name="run",
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
        ),
    ).fit()
    return folder, grid


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_fault_ends_as_the_table_says(faulty_search):
    folder, grid = faulty_search
    for results in (nc.Results(grid, GOAL), nc.Results(folder / "run", GOAL)):
        table = results.dataframe().set_index("fault")
        seen = {fault: (table.loc[fault, "status"], table.loc[fault, "error"]) for fault in FAULTS}
        for fault, (status, reason) in FAULTS.items():
            assert seen[fault][0] == status, (fault, seen[fault])
            assert reason in seen[fault][1], (fault, seen[fault])
        assert {t.config["fault"] for t in results.front()} <= {"none", "killed once", "damaged checkpoint"}
        report = results.report(folder / "report.html").read_text()
        assert "longer than its limit of 3 s, in step 2" in report


@pytest.mark.slow
def test_a_killed_trial_goes_on_and_one_without_its_checkpoint_starts_over(faulty_search):
    folder, _ = faulty_search
    steps = {fault: (folder / f"computed {fault}").read_text().split() for fault in FAULTS}
    assert steps["none"] == ["1", "2", "3"]
    assert steps["killed once"] == ["1", "2", "2", "3"]
    assert steps["damaged checkpoint"] == ["1", "2", "1", "2", "3"]


@pytest.mark.slow
def test_a_retrained_task_under_the_same_folder_is_refused(ray_session, tmp_path):
    def trainable(task):
        return tune.with_parameters(recorded(Faulty, {"task": task, "epochs": 2}), folder=str(tmp_path))

    tune.Tuner(
        trainable("trained once"),
        param_space={"fault": "none"},
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="run", verbose=0),
    ).fit()
    path = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"task: 'trained again' was given.*made with 'trained once'"):
        nc.restore(path, trainable("trained again"))
    assert nc.restore(path, trainable("trained once")).fit()[0].metrics["accuracy"] == 1.0
    grid = tune.Tuner(
        trainable("trained again"),
        param_space={"fault": "none"},
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="run", verbose=0),
    ).fit()
    assert "task: 'trained again' was given" in str(grid.errors[0])


@pytest.mark.slow
def test_an_answered_trial_that_saves_at_every_step_computes_nothing(ray_session, tmp_path):
    trainable = tune.with_parameters(recorded(Faulty), folder=str(tmp_path))
    tune.Tuner(
        trainable,
        param_space={"fault": tune.grid_search(["none", "nan"])},
        run_config=tune.RunConfig(
            storage_path=str(tmp_path),
            name="run",
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
        ),
    ).fit()
    for path in (tmp_path / "run").glob("experiment_state-*.json"):
        path.unlink()
    grid = nc.restore(str(tmp_path / "run"), trainable, param_space={"fault": tune.grid_search(["none", "nan"])}).fit()
    assert (tmp_path / "computed none").read_text().split() == ["1", "2", "3"]
    assert [result.metrics["training_iteration"] for result in grid] == [3, 3]
    folders = [Path(result.checkpoint.path) for result in grid]
    assert [(folder / "position").read_text() for folder in folders] == ["3", "3"]
    assert len(nc.Results(tmp_path / "run", GOAL)) == 2


def test_a_hang_in_native_code_ends_the_process_with_its_stacks():
    code = (
        "import ctypes, ray_nascomp.time_limit as t\n"
        "t._GRACE = 0.2\n"
        "with t.deadline(0.2, 'late'):\n"
        "    ctypes.PyDLL(None).sleep(60)\n"  # PyDLL keeps Python's lock.
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "line 4" in ended.stderr


def test_a_deadline_leaves_no_alarm_behind():
    before = signal.getsignal(signal.SIGALRM)
    with deadline(5, "late"):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(nc.errors.TrialTimeoutError, match="late"), deadline(0.05, "late"):
        time.sleep(5)


def test_wrong_wrappings_are_refused():
    with pytest.raises(ConfigError, match=r"time_limit_s.*0 was given"):
        time_limited(Faulty, 0)
    with pytest.raises(ConfigError, match=r"a class derived from tune\.Trainable"):
        recorded(lambda config: None)
