from __future__ import annotations

import os
import threading

import pytest
import torch

import ray_nascomp as nc
from ray_nascomp.compression import static
from ray_nascomp.errors import ConfigError
from ray_nascomp.pipeline import CompressionRun, recipe
from ray_nascomp.pipeline import run as run_module
from ray_nascomp.pipeline.reuse import Reuse, origin_of
from ray_nascomp.pipeline.stage_cache import StageCache

TIMES = ("seconds_", "cache_", "latency_ms", "speedup")


def tensors(value=1.0, count=1000):
    return {"a": torch.full((count,), value)}


def metrics_of(task, config, epochs=2, cache=None):
    """What a run reports and its last file, times left out."""
    reuse = Reuse(cache, origin_of(task)) if cache is not None else None
    run = CompressionRun(task, config, epochs, reuse=reuse)
    reports = []
    while not run.is_done:
        step = run.step()
        reports.append({name: value for name, value in step.metrics.items() if not name.startswith(TIMES)})
    assert step.metrics["feasible"], step.metrics["reason"]
    return reports, step.artifact.content, (run.reuse.hits, run.reuse.misses) if cache is not None else None


def test_entries_come_back_and_damaged_ones_are_removed(tmp_path, caplog):
    cache = StageCache(tmp_path)
    cache.write("one", tensors(2.0), {"removed": {"g": [1, 2]}})
    entry = cache.read("one")
    assert torch.equal(entry.tensors["a"], tensors(2.0)["a"])
    assert entry.facts == {"removed": {"g": [1, 2]}}
    assert cache.read("other") is None
    file = tmp_path / "one.stage"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # One bit of one weight.
    for damaged in (bytes(content), bytes(content[:50]), b""):
        file.write_bytes(damaged)
        assert cache.read("one") is None
        assert not file.exists()
    assert "damaged" in caplog.text


def test_what_was_used_longest_ago_goes_first(tmp_path):
    cache = StageCache(tmp_path, max_bytes=21_500)
    for number, key in enumerate("abcde"):
        cache.write(key, tensors(), {})
        os.utime(tmp_path / f"{key}.stage", (number, number))
    assert cache.read("a") is not None
    cache.write("f", tensors(), {})
    assert {path.stem for path in tmp_path.glob("*.stage")} == {"a", "d", "e", "f"}
    assert cache.size <= 21_500


def test_an_entry_larger_than_all_is_not_kept_and_left_behind_files_go(tmp_path):
    cache = StageCache(tmp_path, max_bytes=5000)
    (tmp_path / "dead.stage-partial").write_bytes(b"x")
    os.utime(tmp_path / "dead.stage-partial", (0, 0))
    cache.write("large", tensors(count=5000), {})
    cache.write("small", tensors(), {})
    assert {path.name for path in tmp_path.iterdir()} == {"small.stage"}


def test_writers_and_readers_at_once_see_whole_entries(tmp_path):
    seen = []

    def work(value):
        cache = StageCache(tmp_path, max_bytes=30_000)
        for turn in range(30):
            cache.write(f"k{turn % 10}", tensors(float(turn % 10)), {"turn": turn % 10})
            entry = cache.read(f"k{(turn + value) % 10}")
            if entry is not None:
                seen.append(bool((entry.tensors["a"] == entry.facts["turn"]).all()))

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) > 20
    assert all(seen)
    assert not list(tmp_path.glob("*.stage-partial"))


def test_files_of_others_are_left_alone(tmp_path):
    others = [tmp_path / name for name in ("model.safetensors", "download.partial", "notes.used")]
    for other in others:
        other.write_bytes(b"x" * 9000)
        os.utime(other, (0, 0))
    cache = StageCache(tmp_path, max_bytes=9000)
    for key in "abcd":
        cache.write(key, tensors(), {})
    assert 0 < cache.size <= 9000
    assert all(other.exists() for other in others)


@pytest.mark.parametrize(
    "arguments", [{"max_bytes": 0}, {"location": "nosuchscheme://x"}, {"location": ""}, {"location": 3}]
)
def test_mistakes_are_named(tmp_path, arguments):
    with pytest.raises(ConfigError, match=r"max_bytes|cache"):
        StageCache(**{"location": tmp_path, **arguments})


PTQ = {"prune": {"sparsity": 0.5}, "finetune": {"lr": 3e-3}, "quantize": {"bits": 8}}
CONFIGS = [
    PTQ,
    {**PTQ, "quantize": {"bits": {"*": 8, "head": 32}}},
    {**PTQ, "quantize": {"method": "qat", "bits": 8, "start": 0.5}},
    {**PTQ, "low_rank": {"rank": 0.5}, "finetune": {"distill": {"weight": 0.5, "layers": "adaptive1d"}}},
    {**PTQ, "prune": {"sparsity": 0.4, "method": "level"}},
    {**PTQ, "prune": {"sparsity": 0.5, "schedule": "agp"}, "low_rank": {"rank": 0.5}},
]


def test_results_with_and_without_the_cache_are_the_same_bits(digits_task, tmp_path):
    cache = StageCache(tmp_path)
    for config in CONFIGS:
        plain, content, _ = metrics_of(digits_task, config)
        filled, _, _ = metrics_of(digits_task, config, cache=cache)
        taken, again, (_, misses) = metrics_of(digits_task, config, cache=cache)
        assert plain == filled == taken
        assert content == again
        assert misses == 0


def test_other_bits_of_a_network_in_the_cache_are_what_they_are_without_it(digits_task, tmp_path, monkeypatch):
    cache = StageCache(tmp_path)
    names = digits_task.spec.quantizable_names
    several = [
        {**PTQ, "quantize": {"bits": {name: 4 if index % 3 == rest else 8 for index, name in enumerate(names)}}}
        for rest in range(3)
    ]
    plain = [metrics_of(digits_task, config)[:2] for config in several]
    metrics_of(digits_task, several[0], cache=cache)

    def forbidden(*_arguments):
        raise AssertionError("observed again")

    monkeypatch.setattr(static, "observe_inputs", forbidden)
    assert [metrics_of(digits_task, config, cache=cache)[:2] for config in several[1:]] == plain[1:]


def test_what_plans_begin_with_is_shared_and_nothing_else(digits_task, tmp_path):
    cache = StageCache(tmp_path)
    assert metrics_of(digits_task, PTQ, cache=cache)[2] == (0, 5)  # Pruning, 2 epochs, 2 files.
    other_bits = {**PTQ, "quantize": {"bits": 4}}
    assert metrics_of(digits_task, other_bits, cache=cache)[2] == (3, 2)
    trained_otherwise = {**PTQ, "finetune": {"lr": 1e-3}}
    assert metrics_of(digits_task, trained_otherwise, cache=cache)[2] == (2, 3)
    with_ranks = {**PTQ, "low_rank": {"rank": 0.5}}
    assert metrics_of(digits_task, with_ranks, cache=cache)[2] == (0, 6)
    other_ranks = {**PTQ, "low_rank": {"rank": 0.4}}
    assert metrics_of(digits_task, other_ranks, cache=cache)[2] == (1, 5)
    assert metrics_of(digits_task, {**PTQ, "prune": {"sparsity": 0.6}}, cache=cache)[2] == (0, 5)
    trained_quantized = {**PTQ, "quantize": {"method": "qat", "bits": 8}}
    assert metrics_of(digits_task, trained_quantized, cache=cache)[2] == (2, 3)


def test_stages_that_others_have_carried_out_are_not_carried_out_again(digits_task, tmp_path, monkeypatch):
    cache = StageCache(tmp_path)
    expected, _, _ = metrics_of(digits_task, PTQ, cache=cache)

    def forbidden(*_arguments):
        raise AssertionError("carried out again")

    monkeypatch.setattr(run_module, "make_candidate", forbidden)
    monkeypatch.setattr(run_module.Trainer, "epoch", forbidden)
    assert metrics_of(digits_task, PTQ, cache=cache)[0] == expected


def test_another_task_seed_or_code_shares_nothing(digits, digits_task, tmp_path):
    from networks import ResidualNet

    inputs, targets = digits["train"]
    network = ResidualNet()
    network.load_state_dict(digits_task.model.state_dict())
    origins = {
        origin_of(task)
        for task in (
            digits_task,
            nc.Task(network, (inputs.flip(0), targets.flip(0)), digits["val"]),
            nc.Task(network, digits["train"], digits["val"], batch_size=16),
            nc.Task(network, digits["train"], digits["val"], loss=lambda o, t: torch.nn.functional.cross_entropy(o, t)),
            nc.Task(network, digits["train"], digits["val"], loss=_smoothed(0.1)),
            nc.Task(network, digits["train"], digits["val"], loss=_smoothed(0.2)),
        )
    }
    assert len(origins) == 6
    assert origin_of(nc.Task(network, digits["train"], digits["val"])) == origin_of(digits_task)
    one, other = (CompressionRun(digits_task, {**PTQ, "repetition": n}, 2).recipe for n in (1, 2))
    assert one.ready() != other.ready()
    assert one.seed(1) != other.seed(1)


def _smoothed(amount):
    return lambda outputs, targets: torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=amount)


def test_seeds_follow_from_what_comes_before(digits_task):
    runs = [CompressionRun(digits_task, config, 2).recipe for config in (PTQ, CONFIGS[1], CONFIGS[3])]
    assert runs[0].seed(1) == runs[1].seed(1) == runs[2].seed(1)
    assert runs[0].training_seed == runs[1].training_seed != runs[2].training_seed
    assert recipe.seed_of("a") != recipe.seed_of("b")
