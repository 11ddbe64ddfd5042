from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
from ray import tune

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.observations import Status
from ray_nascomp.results.loading import status_of

GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("cost", "min")], [nc.Constraint("drop", "<=", 0.1)])


def row(accuracy, cost, drop=0.0, **more):
    base = {"accuracy": accuracy, "cost": cost, "drop": drop, "final": True, "feasible": True, "reason": ""}
    return {**base, "goal": GOAL.to_json(), "training_iteration": 2, "timestamp": 100, "time_total_s": 1, **more}


def write_trial(folder: Path, name: str, rows: list[dict], config=None, error: str | None = None, torn: bool = False):
    path = folder / name
    path.mkdir(parents=True)
    config = config or {"a": {"b": 1}, "name": name}
    (path / "params.json").write_text(json.dumps(config))
    lines = [json.dumps({**r, "trial_id": name, "config": config}) for r in rows]
    (path / "result.json").write_text("\n".join(lines) + ('\n{"accuracy": 0.9, "co' if torn else "\n"))
    if error:
        (path / "error.txt").write_text(error)
    return path


@pytest.fixture
def folder(tmp_path):
    write_trial(tmp_path, "good", [row(0.5, 9.0, final=False, timestamp=98), row(0.9, 2.0, timestamp=101)])
    write_trial(tmp_path, "cheap", [row(0.8, 1.0, timestamp=103)], torn=True)
    write_trial(tmp_path, "dominated", [row(0.7, 3.0, timestamp=102)])
    write_trial(tmp_path, "violates", [row(0.99, 0.1, drop=0.5, timestamp=104)])
    write_trial(tmp_path, "nan", [row(math.nan, 0.1, timestamp=105)])
    write_trial(tmp_path, "impossible", [row(0.0, 5.0, feasible=False, reason="layer 'x' would be empty")])
    write_trial(tmp_path, "broken", [], error="Traceback\nRuntimeError: <script>alert(1)</script>")
    write_trial(tmp_path, "running", [row(0.4, 4.0, final=False)])
    return tmp_path


def test_a_folder_tells_how_each_trial_ended(folder):
    results = nc.Results(folder)
    assert results.goal == GOAL
    assert {t.trial_id: t.status for t in results.trials} == {
        "good": "completed",
        "cheap": "completed",
        "dominated": "completed",
        "violates": "completed",
        "nan": "failed",
        "impossible": "infeasible",
        "broken": "failed",
        "running": "unfinished",
    }
    table = results.dataframe().set_index("trial_id")
    assert table.loc["good", "a/b"] == 1
    assert table.loc["good", "accuracy"] == 0.9
    assert "RuntimeError" in table.loc["broken", "error"]


def test_trials_stand_in_the_order_of_their_start(folder):
    # By their first reports: at 97, 99 (three of them), 101, 102, 103, 104 seconds; one has none.
    names = [trial.trial_id for trial in nc.Results(folder).trials]
    assert names == ["broken", "good", "impossible", "running", "dominated", "cheap", "violates", "nan"]
    listed = [[json.dumps({"trial_id": name, "status": "TERMINATED"}), ""] for name in ("nan", "good")]
    (folder / "experiment_state-1.json").write_text(json.dumps({"trial_data": listed}))
    assert [trial.trial_id for trial in nc.Results(folder).trials][:2] == ["nan", "good"]


def test_the_front_is_feasible_and_non_dominated(folder):
    results = nc.Results(str(folder))
    assert results.pareto_front()["trial_id"].tolist() == ["good", "cheap"]


def test_hypervolume_by_hand(folder):
    results = nc.Results(folder)
    # Losses (-.9, 2), (-.8, 1), (-.7, 3); ideal (-.9, 1), nadir (-.7, 3): unit points (0, .5), (.5, 0).
    assert results.hypervolume() == pytest.approx(0.75)
    # With a worst cost of 5 and a worst accuracy of .5: (0, .25), (.25, 0).
    assert results.hypervolume({"cost": 5.0, "accuracy": 0.5}) == pytest.approx(1 - 0.25**2)
    assert results.history()["hypervolume"].tolist() == pytest.approx([0.5, 0.5, 0.75, 0.75])


def test_best_is_the_knee_or_an_objectives_best_within_constraints(folder):
    results = nc.Results(folder)
    assert results.best("accuracy").trial_id == "good"
    assert results.best("cost").trial_id == "cheap"
    assert results.best("accuracy", [nc.Constraint("cost", "<=", 1.5)]).trial_id == "cheap"
    assert results.best().trial_id in ("good", "cheap")
    with pytest.raises(ConfigError, match=r"none of 4 completed trials fulfils drop <= 0.1, accuracy >= 0.95"):
        results.best(constraints=[nc.Constraint("accuracy", ">=", 0.95)])
    with pytest.raises(ConfigError, match="'speed' is unknown"):
        results.best("speed")


def test_observations_keep_what_a_searcher_can_learn_from(folder):
    found = {o.trial_id: o.status for o in nc.Results(folder).observations()}
    assert found["good"] is Status.COMPLETED
    assert found["impossible"] is Status.INFEASIBLE
    assert found["broken"] is Status.FAILED
    assert "running" not in found


def test_a_search_compares_with_another_in_one_box(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_trial(other, "only", [row(0.8, 2.0)])
    table = nc.Results(folder).compare(nc.Results(other))
    assert table.loc["this", "hypervolume"] == pytest.approx(0.75)
    assert table.loc["other", "hypervolume"] == pytest.approx(0.25)
    assert table["dominated"].tolist() == [0, 1]
    assert table["accuracy"].tolist() == [0.9, 0.8]
    assert table["cost"].tolist() == [1.0, 2.0]


def test_the_report_is_one_safe_file(folder):
    path = nc.Results(folder).report(folder / "out" / "report.html")
    text = path.read_text()
    assert path.stat().st_size < 6e6
    assert "<script>alert(1)</script>" not in text
    assert "RuntimeError: &lt;script&gt;" in text
    assert "layer &#39;x&#39; would be empty" in text
    page = text[text.index("<body>") : text.index("plotly.js (basic")]
    assert "http://" not in page
    assert "src=" not in page


@pytest.mark.parametrize("figure", ["plot_front", "plot_history"])
def test_figures_hold_the_trials(folder, figure):
    drawn = getattr(nc.Results(folder), figure)()
    assert sum(len(trace.x) for trace in drawn.data) == 4


def test_parallel_axes_are_to_scale_and_skip_what_is_constant(tmp_path):
    for number, rate in enumerate((1e-4, 1e-3, 1e-2)):
        config = {"lr": rate, "a": {"method": "pqr"[number]}, "constant": 1}
        write_trial(tmp_path, f"t{number}", [row(0.5 + 0.1 * number, 10.0 + number**2)], config)
    drawn = nc.Results(tmp_path).plot_parallel()
    assert list(drawn.layout.xaxis.ticktext) == ["lr", "a/method", "accuracy", "cost"]
    lines = {name: line for trace in drawn.data for name, line in lines_of(trace).items()}
    # Three decades of a rate are drawn on a logarithmic axis, a cost of 10 to 14 is not.
    assert lines["t0"] == [0, 0, 0, 0]
    assert lines["t1"] == [0.5, 0.5, 0.5, 0.25]
    assert lines["t2"] == [1, 1, 1, 1]


def lines_of(trace):
    """Trial -> heights of its line on the axes."""
    lines = {}
    for trial, height in zip(trace.customdata, trace.y, strict=True):
        if trial is not None:
            lines.setdefault(trial, []).append(height)
    return lines


LAYERS = [
    {"name": "stem", "type": "conv", "params_before": 100, "params_after": 40, "macs_before": 900, "macs_after": 360,
     "bytes_before": 400, "bytes_after": 40, "channels_before": 10, "channels_after": 4, "group": "stem",
     "sparsity": 0.6, "bits": 8},
    {"name": "norm", "type": "batch_norm", "params_before": 20, "params_after": 8, "macs_before": 0, "macs_after": 0,
     "bytes_before": 0, "bytes_after": 0, "channels_before": 10, "channels_after": 4, "group": "stem",
     "sparsity": 0.6, "bits": 32},
]  # fmt: skip


def with_layers(folder, name):
    checkpoint = folder / name / "checkpoint_000000"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(json.dumps({"layers": LAYERS}))


def test_layers_come_from_the_manifest(folder):
    with_layers(folder, "good")
    best = nc.Results(folder).best("accuracy")
    assert best.layers() == LAYERS
    figure = best.plot_layers()
    assert [(bar.name, list(bar.x), list(bar.y)) for bar in figure.data[:2]] == [
        ("before", ["stem"], [100]),
        ("after", ["stem"], [40]),
    ]
    assert nc.Results(folder).best("cost").layers() == []


def test_failures_with_one_reason_are_told_once(tmp_path):
    for number in range(4):
        reason = "too thin" if number < 3 else "too slow"
        write_trial(tmp_path, f"t{number}", [row(0.0, 5.0, feasible=False, reason=reason)])
    text = nc.Results(tmp_path).report(tmp_path / "report.html").read_text()
    assert text.count("<summary>too thin</summary><p>t0, t1, t2</p>") == 1
    assert text.index("too thin") < text.index("too slow")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_draws_the_report_without_complaint(folder, tmp_path):
    with_layers(folder, nc.Results(folder).best().trial_id)
    report = nc.Results(folder).report(tmp_path / "report.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, *profile, report.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    front = done.stdout[done.stdout.index('id="plot-front"') : done.stdout.index('id="plot-front-data"')]
    assert front.count('class="point ') == 4  # Five, one of them without an accuracy.
    network = done.stdout[done.stdout.index('id="trial-network"') : done.stdout.index('id="trial-table"')]
    assert network.count("left bits-8") == 1
    assert "-60%, 8 bits" in network


def test_importance_finds_the_dimension_that_matters(tmp_path):
    pytest.importorskip("sklearn")
    for number in range(24):
        config = {"a": {"width": number % 6}, "method": "pq"[number % 2], "constant": 3, "noise": (number * 7) % 5}
        metrics = row(0.1 * (number % 6), 2.0 + (number % 2) * 3)
        write_trial(tmp_path, f"t{number:02d}", [metrics], config)
    table = nc.Results(tmp_path).importance()
    assert list(table.index[:1]) == ["a/width"]
    assert "constant" not in table.index
    assert table["accuracy"].sum() == pytest.approx(1.0)
    assert table.loc["a/width", "accuracy"] > 0.9
    assert table.loc["method", "cost"] > 0.9
    page = nc.Results(tmp_path).report(tmp_path / "report.html").read_text()
    assert "What matters" in page
    assert '<td class="name">a/width</td>' in page


def test_importance_needs_enough_trials(folder):
    pytest.importorskip("sklearn")
    with pytest.raises(ConfigError, match="4 trials have been completed, 10 are needed"):
        nc.Results(folder).importance()


def test_a_front_of_three_objectives_has_a_panel_for_each_further_one(folder):
    goal = nc.Goal([*GOAL.objectives, nc.Objective("drop", "min")])
    drawn = nc.Results(folder, goal).plot_front()
    assert [trace.xaxis for trace in drawn.data] == ["x"] * 3 + ["x2"] * 3
    assert all("a/b: 1" in text for trace in (*drawn.data[:3], drawn.data[5]) for text in trace.hovertext)
    assert not any("a/b" in text for trace in drawn.data[3:5] for text in trace.hovertext)
    assert drawn.layout.xaxis2.title.text == "drop (less is better)"


def test_configs_cannot_break_out_of_the_reports_scripts(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    for number in range(3):
        config = {evil: evil + str(number), "n": number}
        write_trial(tmp_path, f"t{number}", [row(0.5 + 0.1 * number, float(number), note=evil)], config)
    text = nc.Results(tmp_path).report(tmp_path / "report.html").read_text()
    page = text[text.index("<body>") :]
    assert "<img" not in page[: page.index("plotly.js (basic")]
    assert "onerror=alert(1)" in page  # As text.


def test_nested_metrics_have_names_with_a_slash(tmp_path):
    goal = nc.Goal([nc.Objective("val/accuracy")])
    write_trial(tmp_path, "one", [{"val": {"accuracy": 0.5}, "final": True, "training_iteration": 1}])
    assert nc.Results(tmp_path, goal).pareto_front()["val/accuracy"].tolist() == [0.5]


def test_a_report_without_any_completed_trial_still_opens(tmp_path):
    write_trial(tmp_path, "running", [row(0.4, 4.0, final=False)])
    results = nc.Results(tmp_path)
    assert results.hypervolume() == 0
    assert results.front() == []
    assert results.pareto_front()[["trial_id", "status"]].values.tolist() == [["running", "unfinished"]]
    assert "No trial has completed" in results.report(tmp_path / "report.html").read_text()
    with pytest.raises(ConfigError, match="no trial has been completed"):
        results.best()


def test_folders_that_hold_no_experiment_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not the folder of an experiment"):
        nc.Results(tmp_path / "nowhere")
    (tmp_path / "file").mkdir()
    with pytest.raises(ConfigError, match="holds no trial"):
        nc.Results(tmp_path)
    write_trial(tmp_path, "goalless", [{"accuracy": 1.0}])
    with pytest.raises(ConfigError, match="goal: none was given"):
        nc.Results(tmp_path)


def test_a_search_whose_trials_all_failed_says_why(tmp_path):
    for number in range(2):
        write_trial(tmp_path, f"t{number}", [], error="Traceback\nModuleNotFoundError: No module named 'digits'")
    with pytest.raises(ConfigError, match="all 2 trials failed; t0 with ModuleNotFoundError: No module named 'digits'"):
        nc.Results(tmp_path)


def test_a_trial_without_files_says_so(folder):
    best = nc.Results(folder).best("cost")
    with pytest.raises(ConfigError, match="has no checkpoint"):
        best.export(folder / "model.onnx")
    with pytest.raises(ConfigError, match="task="):
        best.evaluate()


@pytest.mark.parametrize(
    ("rows", "tune_status", "error", "expected"),
    [
        ([{"final": True}], "", "", "completed"),
        ([{"done": True}], "TERMINATED", "", "completed"),
        ([{"final": False, "done": True}], "TERMINATED", "", "stopped"),
        ([{"final": True, "feasible": False}], "TERMINATED", "", "infeasible"),
        ([{"final": False}], "ERROR", "boom", "failed"),
        ([{"final": True}], "TERMINATED", "an earlier try failed", "completed"),
        ([], "", "", "unfinished"),
    ],
)
def test_status_follows_from_reports_and_tune(rows, tune_status, error, expected):
    assert status_of(rows, tune_status, error) == expected


def objective(config):
    if config["x"] > 0.9:
        raise RuntimeError("too large")
    tune.report({"accuracy": config["x"], "cost": config["x"] ** 2, "drop": 0.0})


def test_grid_and_folder_agree(ray_session, tmp_path):
    from ray_nascomp.results import FrontReporter

    tuner = tune.Tuner(
        objective,
        param_space={"x": tune.grid_search([0.1, 0.5, 0.8, 0.95])},
        run_config=tune.RunConfig(
            storage_path=str(tmp_path), name="grid", verbose=0, callbacks=[FrontReporter(GOAL, 4)]
        ),
    )
    grid = tuner.fit()
    from_grid = nc.Results(grid, goal=GOAL)
    from_folder = nc.Results(tmp_path / "grid", goal=GOAL)
    assert from_grid.dataframe().equals(from_folder.dataframe())
    assert [t.status for t in from_grid.trials].count("failed") == 1
    assert from_grid.best("cost").config == {"x": 0.1}


def test_a_search_that_failed_whole_does_not_hide_behind_an_earlier_one(ray_session, tmp_path, caplog):
    def run(value):
        space = {"x": tune.grid_search([value])}
        run_config = tune.RunConfig(storage_path=str(tmp_path), name="twice", verbose=0)
        return nc.Results(tune.Tuner(objective, param_space=space, run_config=run_config).fit(), goal=GOAL)

    run(0.1)
    assert "of this search failed" not in caplog.text
    assert len(run(0.95)) == 2
    assert "all 1 trials of this search failed, the first with: " in caplog.text
    assert "too large" in caplog.text
