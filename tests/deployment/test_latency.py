from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from ray_nascomp.deployment.export import export_onnx
from ray_nascomp.deployment.latency_table import LatencyTable, LayerUse
from ray_nascomp.deployment.runtime import compare_latency, measure_latency
from ray_nascomp.errors import ConfigError

GRID = [
    {"layer": "conv", "bits": 8, "inputs": inputs, "outputs": outputs, "ms": inputs * outputs / 100}
    for inputs in (4, 8)
    for outputs in (10, 20)
]


class Counting(nn.Module):
    """Remembers what it is called on, and with how many threads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.seen: set[tuple[int, int]] = set()

    def forward(self, x):
        self.seen.add((len(x), torch.get_num_threads()))
        return self.linear(x)


def test_batch_size_and_threads_are_those_asked_for_in_torch():
    network = Counting()
    before = torch.get_num_threads()
    latency = measure_latency(network, Counting(), torch.randn(2, 6), batch_size=5, threads=2, rounds=3)
    assert network.seen == {(5, 2)}
    assert torch.get_num_threads() == before
    assert latency.original_ms > 0
    assert latency.compressed_ms > 0


def test_a_file_is_timed_against_a_network():
    network = nn.Sequential(nn.Linear(6, 3))
    content = export_onnx(network, torch.randn(2, 6), ("x",)).SerializeToString()
    latency = measure_latency(network, content, torch.randn(1, 6), ("x",), rounds=3)
    assert latency.speedup > 0
    assert latency.spread >= 0
    with pytest.raises(ConfigError, match="threads"):
        measure_latency(content, content, torch.randn(1, 6), ("x",), threads=0)


class Busy(nn.Module):
    """Takes five milliseconds of processor time, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        start = time.thread_time()
        while time.thread_time() - start < 0.005:
            pass
        return x


@pytest.mark.parametrize(("enough", "rounds"), [(0.0, 12), (1.0, 5)])
def test_timing_ends_where_the_speedup_is_known_well_enough(enough, rounds):
    first, second = Busy(), Busy()
    latency = compare_latency(first, second, torch.zeros(1, 1), (), rounds=12, enough=enough)
    assert first.calls == second.calls == 3 + rounds
    assert latency.speedup == pytest.approx(1.0, rel=0.5)


def test_between_measured_widths_the_estimate_is_bilinear():
    table = LatencyTable(GRID)
    uses = [(8, 20), (6, 15), (4, 12), (2, 10), (4, 5), (16, 20)]
    found = [table.estimate([LayerUse("conv", 8, *use)]) for use in uses]
    assert found == pytest.approx([inputs * outputs / 100 for inputs, outputs in uses])


def test_layers_add_up_and_those_not_in_the_table_cost_nothing():
    table = LatencyTable([*GRID, {"layer": "head", "bits": 32, "inputs": 20, "outputs": 2, "ms": 3.0}])
    uses = [LayerUse("conv", 8, 4, 10), LayerUse("head", 32, 10, 2), LayerUse("relu", 32, 1, 1)]
    assert table.estimate(uses) == pytest.approx(0.4 + 1.5)
    with pytest.raises(ConfigError, match=r"conv.*4 bits.*\[8\]"):
        table.estimate([LayerUse("conv", 4, 4, 10)])


def test_files_and_their_mistakes(tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(GRID))
    lines = ["layer,bits,inputs,outputs,ms", *(",".join(str(row[name]) for name in row) for row in GRID)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    for name in ("table.json", "table.csv"):
        table = LatencyTable.from_file(tmp_path / name)
        assert table.estimate([LayerUse("conv", 8, 6, 15)]) == pytest.approx(0.9)
    with pytest.raises(ConfigError, match="absent"):
        LatencyTable.from_file(tmp_path / "absent.csv")
    with pytest.raises(ConfigError, match="entry 1 lacks"):
        LatencyTable([{"layer": "conv", "bits": 8}])
    with pytest.raises(ConfigError, match="has 3 entries"):
        LatencyTable(GRID[:3])
    with pytest.raises(ConfigError, match="entry 1"):
        LatencyTable([{**GRID[0], "ms": float("nan")}])
