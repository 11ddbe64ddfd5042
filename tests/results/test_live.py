from __future__ import annotations

import io
import pickle
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

import ray_nascomp as nc
from ray_nascomp.results import FrontReporter
from ray_nascomp.results.live_view import sparkline, view
from ray_nascomp.results.progress import Progress, duration, tracked

GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("cost", "min")], [nc.Constraint("drop", "<=", 0.1)])


def report(accuracy, cost, drop=0.0, **more):
    return {"accuracy": accuracy, "cost": cost, "drop": drop, "final": True, **more}


def play(reporter, width=80, is_terminal=False):
    """A search of four trials, as Tune tells it; what was printed."""
    text = io.StringIO()
    reporter.setup(total_num_samples=4)
    reporter._console = Console(file=text, width=width, force_terminal=is_terminal, highlight=False)
    trials = [SimpleNamespace(trial_id=f"t{i}", status="RUNNING", error_file=None) for i in range(4)]
    for trial, result in zip(
        trials,
        (
            report(0.9, 2.0),
            report(0.8, 1.0),
            report(0.7, 3.0),
            report(0.0, 0.0, feasible=False, reason="layer [bold]x[/] is empty"),
        ),
        strict=True,
    ):
        reporter.on_trial_start(1, trials, trial)
        reporter.on_trial_result(1, trials, trial, result)
        trial.status = "TERMINATED"
        reporter.on_trial_complete(1, trials, trial)
    reporter.on_experiment_end(trials)
    return text.getvalue()


def test_a_log_file_gets_a_line_for_each_trial_and_a_summary():
    lines = play(FrontReporter(GOAL), width=200).splitlines()
    assert len(lines) == 5
    assert "\x1b" not in "".join(lines)
    assert lines[0].endswith("completed   front  accuracy 0.9  cost 2  drop 0")
    assert lines[2].endswith("accuracy 0.7  cost 3  drop 0")
    assert "layer [bold]x[/] is empty" in lines[3]
    assert lines[4].startswith("4 of 4 trials in")
    assert lines[4].endswith("3 completed, 1 infeasible; 2 on the front, hypervolume 0.750")


def test_a_terminal_gets_the_front_below_the_lines():
    text = play(FrontReporter(GOAL), is_terminal=True)
    assert "3 running" in text
    assert text.rstrip().endswith("\x1b[?25h")
    assert text.count("t1") >= 2


def test_a_narrow_terminal_cuts_results_and_wraps_what_went_wrong():
    text = play(FrontReporter(GOAL), width=48, is_terminal=True)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", text).splitlines()
    assert max(map(len, lines)) <= 48
    assert any(line.endswith("…") for line in lines)
    assert "is empty" in text


def test_a_search_without_a_feasible_result_shows_the_nearest():
    reporter = FrontReporter(GOAL)
    reporter.setup(total_num_samples=2)
    for name, drop in (("far", 0.9), ("near", 0.2)):
        reporter._progress.end(name, report(0.5, 1.0, drop), "TERMINATED")
    console = Console(width=80, file=io.StringIO())
    console.print(view(reporter._progress, 1, console))
    assert "No trial fulfils the constraints yet" in console.file.getvalue()
    assert "near" in console.file.getvalue().splitlines()[-1]


def test_the_hypervolume_so_far_is_drawn_in_todays_box():
    progress = Progress(GOAL)
    for number, metrics in enumerate((report(0.7, 3.0), report(0.8, 1.0), report(0.9, 2.0))):
        progress.end(str(number), metrics, "TERMINATED")
    # The box runs from (.9, 1) to (.7, 3): nothing, then half of it, then three quarters.
    assert progress.curve() == pytest.approx([0, 0.5, 0.75])
    assert sparkline(progress.curve()) == "▁▅▇"
    assert len(progress.curve(points=2)) == 2


@pytest.mark.parametrize("terminal", ["0", "1"])
def test_a_long_training_shows_how_far_it_is(capsys, monkeypatch, terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    steps = [SimpleNamespace(metrics={"accuracy": value}) for value in (0.5, 0.75)]
    minutes, now = iter(range(100)), time.monotonic()

    def start(on_progress):
        yield steps[0]
        monkeypatch.setattr("ray_nascomp.results.progress.time.monotonic", lambda: now + 31 * next(minutes))
        for done in (0.0, 0.25, 0.5):
            on_progress("teacher", done)
        for done in (0.0, 0.25):
            on_progress("pruning", done)
        for done in (0.0, 0.5):
            on_progress("training", done)
        monkeypatch.undo()
        yield steps[1]

    assert list(tracked(start, 2, "accuracy")) == steps
    shown = capsys.readouterr()
    assert "epoch 1/1  accuracy 0.75" in shown.err
    is_lines = terminal == "0"
    assert ("epoch 0/1  accuracy 0.5\n" in shown.err) == is_lines
    assert ("the teacher has read 50% of the samples  accuracy 0.5\n" in shown.err) == is_lines
    assert ("25% of the pruning  accuracy 0.5\n" in shown.err) == is_lines
    assert ("epoch 0.50/1  accuracy 0.5\n" in shown.err) == is_lines
    assert shown.out == ""


def test_loggers_after_it_write_the_front(tmp_path):
    reporter = FrontReporter(GOAL)
    reporter.setup(total_num_samples=2)
    reporter._progress.end("t0", report(0.9, 2.0), "TERMINATED")
    result = report(0.8, 1.0)
    reporter.on_trial_result(1, [], SimpleNamespace(trial_id="t1"), result)
    assert result["front_size"] == 1
    assert "front_hypervolume" in result


def test_a_reporter_travels_with_its_search():
    reporter = FrontReporter(GOAL)
    play(reporter)
    assert pickle.loads(pickle.dumps(reporter))._console is None


def test_a_trial_that_is_tried_again_has_not_ended():
    reporter = FrontReporter(GOAL)
    reporter.setup(num_samples=1)
    reporter.on_trial_error(1, [], SimpleNamespace(trial_id="t", status="PENDING"))
    assert reporter._progress.ended == 0


def test_progress_follows_the_front():
    progress = Progress(GOAL)
    assert progress.hypervolume() == 0
    progress.total = 8
    for number, metrics in enumerate((report(0.8, 1.0), report(0.9, 2.0), report(0.7, 3.0), {})):
        assert progress.left is None
        progress.end(str(number), metrics, "TERMINATED" if metrics else "ERROR")
    assert list(progress.front()) == ["1", "0"]
    assert progress.counts["failed"] == 1
    assert progress.hypervolume() == pytest.approx(0.75)
    assert progress.left == pytest.approx(progress.elapsed, rel=0.5)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m")])
def test_durations_read_easily(seconds, text):
    assert duration(seconds) == text
