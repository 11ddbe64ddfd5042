"""Every Python block of the README and the documentation runs, and every public name is documented.

What is large in a text, because a reader wants a good result, is small here.
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sybil = pytest.importorskip("sybil")
from sybil.parsers.markdown import CodeBlockParser, SkipParser  # noqa: E402

ROOT = Path(__file__).parents[1]
TEXTS = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if "```python" in path.read_text())
SMALLER = {
    r"num_samples=\d+": "num_samples=2",
    r"\bepochs=\d+": "epochs=1",
    r"max_t=\d+": "max_t=2",
    r"grace_period=\d+": "grace_period=2",
    r"max_concurrent_trials=\d+": "max_concurrent_trials=1",  # A worker takes longer to start than a trial to run.
}


def evaluate(example: Any) -> None:
    """Runs a block in the namespace of its text."""
    code = example.parsed
    for pattern, replacement in SMALLER.items():
        code = re.sub(pattern, replacement, code)
    # Line numbers as in the text.
    compiled = compile("\n" * example.line + code, example.path, "exec")
    exec(compiled, example.namespace)


@pytest.fixture
def names(tmp_path, monkeypatch, digits) -> dict[str, Any]:
    """What texts take for granted: data, a trained model, a task, a finished experiment."""
    import torch
    from bert_folder import make_bert_folder
    from networks import PlainNet
    from ray import tune
    from results.test_results import row, write_trial

    import ray_nascomp as nc

    monkeypatch.chdir(tmp_path)
    # Experiments of the same name do not meet: Tune has resolved ~/ray_results when it was imported.
    for module in ("ray.train.constants", "ray.tune.experiment.experiment", "ray.tune.trainable.trainable"):
        monkeypatch.setattr(f"{module}.DEFAULT_STORAGE_PATH", str(tmp_path / "ray_results"))
    data = {name: (inputs[:96], targets[:96]) for name, (inputs, targets) in digits.items()}
    torch.manual_seed(0)
    model = PlainNet()
    experiment = tmp_path / "experiment"
    goal = nc.Goal([nc.Objective("accuracy"), nc.Objective("size_mb", mode="min"), nc.Objective("speedup")])
    for number in range(12):
        metrics = row(
            0.5 + 0.03 * number, 2.0, size_mb=0.1 * (1 + number), speedup=1.5, divergence=0.1, goal=goal.to_json()
        )
        write_trial(experiment, f"t{number}", [metrics], {"lr": 0.001 * (1 + number)})
    return {
        # Functions of a text have to reach Ray's workers, as those of a script do.
        "__name__": "__main__",
        "nc": nc,
        "tune": tune,
        "goal": goal,
        "model": model,
        "train_data": data["train"],
        "val_data": data["val"],
        "test_data": data["test"],
        "task": nc.Task(model, data["train"], data["val"], test_data=data["test"]),
        "experiment_folder": experiment,
        "results": nc.Results(experiment),
        "bert_folder": make_bert_folder(tmp_path / "bert") if find_spec("transformers") else None,
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_block_runs(path, names, ray_session):
    if "HuggingFaceTask" in path.read_text() and names["bert_folder"] is None:
        pytest.skip("needs transformers")
    parser = CodeBlockParser(language="python", evaluator=evaluate)
    document = sybil.Sybil(parsers=[parser, SkipParser()], path=str(path.parent)).parse(path)
    document.namespace.update(names)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize(
    ("package", "page"),
    [
        ("ray_nascomp", "core"),
        ("ray_nascomp.searchers", "searchers"),
        ("ray_nascomp.schedulers", "schedulers"),
        ("ray_nascomp.results", "results"),
    ],
)
def test_every_public_name_has_its_place_in_the_reference(package, page):
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    told = set(re.findall(rf"^::: {re.escape(package)}\.(\w+)$", text, re.MULTILINE))
    assert told == set(import_module(package).__all__) - ({"Results"} if page == "core" else set())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_search_files_of_the_guide_have_known_keys():
    import tomllib

    from ray_nascomp.cli.search_file import _KEYS

    text = (ROOT / "docs" / "guides" / "command-line.md").read_text()
    files = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(files) == 2
    for content in files:
        assert set(tomllib.loads(content)) <= set(_KEYS)


def command_lines() -> list[str]:
    """Every command of ours in a text or in a help text, as one would type it."""
    from ray_nascomp.cli import main

    texts = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]
    texts += [command.help or "" for command in (main, *main.commands.values())]
    lines = {line for text in texts for line in re.findall(r"^ +(ray-nascomp .+)$", text, re.MULTILINE)}
    return sorted(line for line in lines if "COMMAND" not in line)


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_is_one_that_the_command_takes(line, tmp_path, monkeypatch):
    from ray_nascomp.cli import main

    monkeypatch.chdir(tmp_path)
    _, *words = shlex.split(line)
    words = list(itertools.takewhile(lambda word: word not in ("|", ">"), words))
    for word in words:
        if word.endswith((".onnx", ".toml")):
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).touch()
    if words != ["--help"]:
        name, *arguments = words
        main.commands[name].make_context(name, arguments)
