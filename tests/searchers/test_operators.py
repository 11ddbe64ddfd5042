from __future__ import annotations

import numpy as np
import pytest
from ray import tune

import ray_nascomp as nc
from ray_nascomp.searchers.operators import Variation
from ray_nascomp.space import Space

SPACE = Space(
    {
        "prune": {"sparsity": {f"layer{i}": nc.sparsity() for i in range(6)}, "method": tune.choice(["a", "b", "c"])},
        "quantize": {"bits": {f"layer{i}": nc.bits([4, 8, 32]) for i in range(3)}},
        "finetune": {"lr": tune.loguniform(1e-4, 1e-1)},
        "width": tune.randint(0, 10**6),
    }
)


def drawn(n=400):
    rng = np.random.default_rng(0)
    return rng, SPACE.encode([SPACE.sample(rng) for _ in range(n)])


def test_children_are_values_of_the_space():
    rng, parents = drawn()
    children = Variation(SPACE.dimensions).mutate(rng, parents)
    assert np.abs(SPACE.encode(SPACE.decode_many(children)) - children)[:, :10].max() < 1e-9
    assert (np.abs(children - parents) > 1e-9).any(axis=1).mean() > 0.95


def test_a_child_of_two_has_each_value_from_one_of_them():
    rng, parents = drawn(50)
    one, other = parents[:25], parents[25:]
    child = Variation(SPACE.dimensions).crossover(rng, one, other)
    assert ((child == one) | (child == other)).all()
    assert 0.3 < (child == one).mean() < 0.7


def test_some_children_move_all_sparsities_together_and_some_late_stages_alone():
    rng, parents = drawn(2000)
    moved = np.abs(Variation(SPACE.dimensions).mutate(rng, parents) - parents) > 1e-9
    names = [d.name for d in SPACE.dimensions]
    sparsities = np.array(["sparsity" in name for name in names])
    late = np.array(["bits" in name or "lr" in name or "width" in name for name in names])
    together = moved[:, sparsities].sum(axis=1) >= 5
    assert together.mean() == pytest.approx(0.25 * 0.33 * 0.88, abs=0.03)
    only_late = moved.any(axis=1) & ~moved[:, ~late].any(axis=1)
    without = np.abs(Variation(SPACE.dimensions, by_role=False).mutate(rng, parents) - parents) > 1e-9
    assert (without[:, sparsities].sum(axis=1) >= 5).mean() < 0.02
    assert only_late.mean() > 1.3 * (without.any(axis=1) & ~without[:, ~late].any(axis=1)).mean()


def test_a_neighbour_with_other_bits_has_nothing_else_changed():
    rng, parents = drawn(1000)
    children = Variation(SPACE.dimensions).requantize(rng, parents)
    moved = np.abs(children - parents) > 1e-9
    is_bits = np.array(["bits" in dimension.name for dimension in SPACE.dimensions])
    assert not moved[:, ~is_bits].any()
    assert moved[:, is_bits].any(axis=1).mean() > 0.9
    assert (moved.sum(axis=1) == 1).mean() == pytest.approx(0.5, abs=0.06)
    assert np.abs(SPACE.encode(SPACE.decode_many(children)) - children)[:, :10].max() < 1e-9
