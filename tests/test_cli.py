from __future__ import annotations

import json
import textwrap

import pytest
from click.testing import CliRunner

from ray_nascomp.cli import main
from ray_nascomp.cli.limits import Aim, Bound, Drop, Duration, Limit
from ray_nascomp.cli.search_file import read_search
from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Constraint, Objective

TASK = """
import torch
from networks import PlainNet
import ray_nascomp as nc


def make_task():
    torch.manual_seed(0)
    images = torch.rand(96, 1, 8, 8)
    data = (images, (images.mean((1, 2, 3)) > 0.5).long())
    return nc.Task(PlainNet(widths=(16, 16)), data, data)
"""


def run(*arguments, exit_code=0):
    """What the command printed; its exit code is checked."""
    done = CliRunner().invoke(main, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == exit_code, done.output
    return done.stdout if exit_code == 0 else done.output


@pytest.fixture
def source(tmp_path, request):
    # A name of its own: Python keeps modules by name.
    name = f"task_{request.node.name.split('[')[0]}"
    (tmp_path / f"{name}.py").write_text(TASK)
    return f"{tmp_path / name}.py:make_task"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (Limit("latency"), "0.5x", Constraint("speedup", ">=", 2.0)),
        (Limit("latency"), "2ms", Constraint("latency_ms", "<=", 2.0)),
        (Limit("latency"), "500us", Constraint("latency_ms", "<=", 0.5)),
        (Limit("size"), "25%", Constraint("size_ratio", ">=", 4.0)),
        (Limit("size"), "300 kB", Constraint("size_mb", "<=", 0.3)),
        (Limit("params"), "1.5M", Constraint("params", "<=", 1.5e6)),
        (Limit("macs"), "0.1x", Constraint("macs_ratio", ">=", 10.0)),
        (Drop(), "1%", 0.01),
        (Drop(), "0.3", 0.3),
        (Duration(), "90", 90.0),
        (Duration(), "1.5h", 5400.0),
        (Bound(), "export_error<=1e-3", Constraint("export_error", "<=", 1e-3)),
        (Aim(), "speedup", Objective("speedup")),
        (Aim(), "size_mb:min", Objective("size_mb", "min")),
    ],
)
def test_limits_mean_what_people_write(kind, text, expected):
    converted = kind.convert(text, None, None)
    if isinstance(expected, Constraint):
        assert (converted.metric, converted.op) == (expected.metric, expected.op)
        assert converted.bound == pytest.approx(expected.bound)
    else:
        assert converted == expected


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--max-size", "3kg"),
        ("--max-size", "0x"),
        ("--max-latency", "fast"),
        ("--max-drop", "a bit"),
        ("--time", "2 days"),
        ("--limit", "x < 1"),
    ],
)
def test_a_limit_that_means_nothing_is_refused(option, text, tmp_path):
    output = run("compress", "task.py:f", option, text, "-o", tmp_path / "out", exit_code=2)
    assert text in output
    assert "is allowed" in output


@pytest.mark.parametrize("command", [[], *[[name] for name in main.commands]])
def test_help_has_examples(command):
    assert "Example" in run(*command, "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nothing.py:f"], "there is no file"),
        (["no_such_module:f"], "there is no module no_such_module"),
        (["{source}_"], "'make_task_' is unknown"),
        (["{folder}/task.py"], "the function is missing"),
        (["./no_model", "--data", "x"], "has no config.json"),
        (["bert"], "data: none was given"),
        (["{source}", "--data", "x"], "data: only for a HuggingFace model"),
        (["{source}", "--prefer", "beauty"], "'beauty' is unknown"),
        (["{source}", "--resume"], "holds no search to go on with"),
    ],
)
def test_wrong_sources_end_with_their_reason(arguments, message, source, tmp_path):
    filled = [text.format(source=source, folder=tmp_path) for text in arguments]
    assert message in " ".join(run("compress", *filled, "-o", tmp_path / "out", exit_code=2).split())


def test_inspect_tells_groups_dimensions_and_costs(source):
    told = json.loads(run("inspect", source, "--json"))
    # 1 -> 16 -> 16 channels without bias, two values of normalisation a channel, 256 -> 20 -> 10 units.
    assert told["costs"]["params"] == 16 * 9 + 32 + 16 * 16 * 9 + 32 + 257 * 20 + 21 * 10
    assert [group["name"] for group in told["groups"] if group["prunable"]] == ["blocks.0.0", "blocks.1.0", "hidden"]
    assert told["dimensions"]["prune/sparsity/hidden"] == "0 to 0.9 in steps of 0.05"
    assert told["dimensions"]["finetune/lr"].endswith("logarithmic")
    table = run("inspect", source)
    assert "head (left whole)" in table


def test_a_model_goes_in_and_a_smaller_one_comes_out(ray_session, source, tmp_path):
    out = tmp_path / "small"
    effort = ["--trials", "3", "--epochs", "1", "--refine", "1", "--workers", "2", "--seed", "0"]
    told = json.loads(
        run("compress", source, "--max-drop", "100%", "--max-params", "0.9x", *effort, "-o", out, "--json")
    )
    assert told["metrics"]["size_mb"] * 1e6 == (out / "model.onnx").stat().st_size
    assert told["metrics"]["size_ratio"] > 1
    assert json.loads((out / "metrics.json").read_text()) == told["metrics"]
    assert {"manifest.json", "model.safetensors", "report.html", "search"} <= {path.name for path in out.iterdir()}
    assert (out / "search" / "latency.jsonl").read_text()  # Timed again, once no trial ran.
    assert "holds a search already" in run("compress", source, "-o", out, exit_code=2)

    found = json.loads(run("report", out / "search", "--json"))
    assert sum(found["trials"].values()) == 3
    assert all(entry["accuracy_drop"] <= 1 for entry in found["front"])
    chosen = found["front"][0]["trial_id"]
    copied = json.loads(run("export", out / "search", "--trial", chosen, "-o", tmp_path / "copy.onnx", "--json"))
    assert copied["trial"] == chosen
    assert "3" in run("export", out / "search", "--limit", "accuracy >= 2", "-o", tmp_path / "x.onnx", exit_code=3)

    timed = json.loads(run("benchmark", out / "model.onnx", tmp_path / "copy.onnx", "--rounds", "3", "--json"))
    assert [row["batch"] for row in timed["latency"]] == [1, 32]
    assert timed["size_mb"]["original"] == told["metrics"]["size_mb"]
    assert "speedup" in run("benchmark", out / "model.onnx", out / "model.onnx", "--rounds", "3", "--batch", "2")


@pytest.mark.slow
def test_a_huggingface_model_is_compressed_with_one_command(ray_session, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    from bert_folder import make_bert_folder

    model = make_bert_folder(tmp_path / "bert")
    reviews = tmp_path / "reviews"
    reviews.mkdir()
    for split, count in (("train", 24), ("validation", 12)):
        lines = [f"a {word} film,{label}" for word, label in (("fine", 1), ("dull", 0))] * (count // 2)
        (reviews / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    task = [model, "--data", reviews, "--kind", "text_classification", "--max-length", "8", "--finetune", "1"]
    effort = ["--trials", "1", "--epochs", "1", "--refine", "0", "--workers", "1", "--seed", "0"]
    out = tmp_path / "small"
    told = json.loads(run("compress", *task, "--max-drop", "100%", *effort, "-o", out, "--json"))
    assert told["metrics"]["size_mb"] < told["metrics"]["size_mb_original"]
    if told["transformers"] is not None:  # Smoothed layers cannot be saved so.
        auto = transformers.AutoModelForSequenceClassification
        loaded = auto.from_pretrained(told["transformers"], trust_remote_code=True)
        assert loaded.num_parameters() <= auto.from_pretrained(model).num_parameters()
    assert "prune" in run("inspect", model)


SEARCH = """
task = "{name}:make_task"
trials = 4
epochs = 1
time = "1h"
[goal]
objectives = ["accuracy", "size_mb min"]
constraints = ["accuracy_drop <= 0.5"]
[space]
bits = "layer"
[set]
"prune/round_to" = 4
"prune/method" = ["l1_norm", "fpgm"]
[searcher]
initial = 4
[scheduler]
grace_period = 2
"""


def described(tmp_path, source, text=SEARCH):
    file = tmp_path / "search.toml"
    file.write_text(text.format(name=source.split("/")[-1].split(":")[0]))
    return file


def test_a_file_describes_a_search(source, tmp_path):
    found = read_search(described(tmp_path, source))
    assert found.goal.objectives == (Objective("accuracy"), Objective("size_mb", "min"))
    assert found.goal.constraints == (Constraint("accuracy_drop", "<=", 0.5),)
    assert (found.effort.trials, found.effort.epochs, found.effort.seconds) == (4, 1, 3600.0)
    assert found.space["prune"]["round_to"] == 4
    assert found.space["prune"]["method"].categories == ["l1_norm", "fpgm"]
    assert set(found.space["quantize"]["bits"]) == {"blocks.0.0", "blocks.1.0", "hidden", "head"}
    assert found.folder == tmp_path / "search"
    dimensions = json.loads(run("search", tmp_path / "search.toml", "--check", "--json"))["dimensions"]
    assert dimensions["prune/round_to"] == "4 (fixed)"


def test_yaml_says_the_same(source, tmp_path):
    file = tmp_path / "search.yaml"
    name = source.split("/")[-1]
    file.write_text(
        textwrap.dedent(f"""
        task: {name}
        goal: {{objectives: [accuracy], constraints: ["params_ratio >= 2"]}}
        scheduler: none
        """)
    )
    found = read_search(file)
    assert found.scheduler is None
    assert found.goal.constraints == (Constraint("params_ratio", ">=", 2.0),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("trials = 4", "trails = 4"), "'trails' is unknown"),
        (("trials = 4", "trials = 0"), "trials: 0 was given"),
        (("initial = 4", "inital = 4"), "searcher: 'inital' is unknown"),
        (("initial = 4", 'name = "magic"'), "searcher.name: 'magic' is unknown"),
        (('bits = "layer"', 'bit = "layer"'), "space: 'bit' is unknown"),
        (('"prune/round_to"', '"prun/round_to"'), "set: 'prun/round_to' is unknown"),
        (("size_mb min", "size_mb low"), "goal.objectives: 'size_mb low' was given"),
        (("[goal]", "[goal"), "cannot be read"),
    ],
)
def test_mistakes_in_a_file_are_named(change, message, source, tmp_path):
    file = described(tmp_path, source, SEARCH.replace(*change))
    with pytest.raises(ConfigError) as caught:
        read_search(file)
    assert message in str(caught.value)


@pytest.mark.slow
def test_the_doctor_tries_what_a_search_needs(ray_session):
    told = json.loads(run("doctor", "--json"))
    assert told["works"]
    assert set(told["checks"]) == {"compression", "ray"}
    assert told["versions"]["nni"] == "3.0"
