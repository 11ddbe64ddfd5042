from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from ray import tune

import ray_nascomp as nc
from ray_nascomp.schedulers.compression_steps import contains, smaller, with_training
from ray_nascomp.space import Space

SPACE = Space(
    {
        "architecture": {"depth": tune.choice([2, 3])},
        "prune": {"method": tune.choice(["l1_norm", "fpgm"]), "sparsity": {"a": nc.sparsity(), "b": nc.sparsity()}},
        "low_rank": {"rank": nc.rank()},
        "finetune": {"lr": tune.loguniform(1e-4, 1e-2), "distill": {"weight": tune.choice([0.0, 0.3, 0.6])}},
        "quantize": {"method": tune.choice(["ptq", "qat"]), "bits": {"x": nc.bits((4, 8, 32)), "y": nc.bits((8, 32))}},
    }
)
seeds = st.integers(0, 10_000)


def drawn(seed):
    return SPACE.sample(np.random.default_rng(seed))


@given(seeds)
def test_a_step_is_contained_in_what_it_came_from_and_costs_less(seed):
    config = drawn(seed)
    child = smaller(np.random.default_rng(seed), SPACE, config)
    assert SPACE.canonical(child) == child
    assert contains(SPACE, config, child)
    before, after = (
        [*c["prune"]["sparsity"].values(), -c["low_rank"]["rank"], *(-b for b in c["quantize"]["bits"].values())]
        for c in (config, child)
    )
    assert all(a >= b for a, b in zip(after, before, strict=True))
    assert after != before or before[:2] == [0.9, 0.9]
    assert child["prune"]["method"] == config["prune"]["method"]
    assert child["quantize"]["method"] == config["quantize"]["method"]


def test_what_cannot_be_compressed_further_keeps_its_structure():
    config = drawn(0)
    config["prune"]["sparsity"] = {"a": 0.9, "b": 0.9}
    config["low_rank"]["rank"], config["quantize"]["bits"] = 0.1, {"x": 4, "y": 8}
    child = smaller(np.random.default_rng(0), SPACE, config)
    assert {**child, "finetune": None} == {**config, "finetune": None}
    assert child["finetune"] != config["finetune"]


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("prune", "sparsity", "a"), 0.45, False),
        (("prune", "sparsity", "a"), 0.6, True),
        (("low_rank", "rank"), 0.6, False),
        (("low_rank", "rank"), 0.4, True),
        (("architecture", "depth"), 3, False),
        (("quantize", "bits", "x"), 32, True),
        (("finetune", "lr"), 5e-3, True),
    ],
)
def test_containing_is_a_matter_of_structure(path, value, expected):
    one = drawn(1)
    one["prune"]["sparsity"], one["low_rank"]["rank"], one["architecture"]["depth"] = {"a": 0.5, "b": 0.5}, 0.5, 2
    other = SPACE.to_config(SPACE.values(one))
    section = other
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    assert contains(SPACE, one, other) is expected


@given(seeds, seeds)
def test_training_is_the_winners_but_for_one_step(one, other):
    config, winner = drawn(one), drawn(other)
    result = with_training(np.random.default_rng(one), SPACE, config, winner)
    assert {**result, "finetune": None} == {**config, "finetune": None}
    lr, weight = result["finetune"]["lr"], result["finetune"]["distill"]["weight"]
    same = (lr == pytest.approx(winner["finetune"]["lr"])) + (weight == winner["finetune"]["distill"]["weight"])
    assert same >= 1
    # A tenth of two decades; a config holds nine digits of each of the two.
    assert 10**-0.2 * (1 - 1e-8) <= lr / winner["finetune"]["lr"] <= 10**0.2 * (1 + 1e-8)
