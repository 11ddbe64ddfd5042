from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import tune

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError
from ray_nascomp.space import Role, Space

SPACE = Space(
    {
        "architecture": {
            "depth": tune.choice([2, 3, 4]),
            "width": nc.when(tune.choice([16, 32]), "architecture/depth", [3, 4]),
            "kernel": nc.when(tune.choice([3, 5]), "architecture/width", [32]),
        },
        "prune": {"method": "l1_norm", "sparsity": {"a.conv": nc.sparsity(), "b.conv": nc.sparsity(0.1, 0.5, 0.1)}},
        "quantize": {"bits": {"fc": nc.bits()}},
        "finetune": {"lr": tune.loguniform(1e-4, 1e-1), "distill": {"weight": tune.uniform(0, 1)}},
        "steps": tune.qrandint(10, 50, 10),
        "tries": tune.randint(0, 5),
        "momentum": 0.9,
    }
)


def test_roles_and_targets_follow_from_the_place():
    found = {d.name: (d.role, d.target) for d in SPACE.dimensions}
    assert found["architecture/depth"] == (Role.ARCHITECTURE, None)
    assert found["prune/sparsity/a.conv"] == (Role.SPARSITY, "a.conv")
    assert found["quantize/bits/fc"] == (Role.BITS, "fc")
    assert found["finetune/distill/weight"] == (Role.DISTILLATION, None)
    assert found["finetune/lr"] == (Role.TRAINING, None)


@given(st.integers(0, 2**32 - 1))
def test_sampled_configs_hold_every_key_and_survive_encoding(seed):
    config = SPACE.sample(np.random.default_rng(seed))
    assert config["momentum"] == 0.9
    assert config["prune"]["method"] == "l1_norm"
    assert len(SPACE.values(config)) == len(SPACE)
    row = SPACE.encode([config])[0]
    assert ((row >= 0) & (row <= 1)).all()
    again = SPACE.decode(row)
    for before, after in zip(SPACE.values(config), SPACE.values(again), strict=True):
        assert after == pytest.approx(before, rel=1e-9) if isinstance(before, float) else after == before


def test_quantized_and_integer_values_are_those_of_tune():
    dimensions = {d.name: d for d in SPACE.dimensions}
    assert dimensions["steps"].levels == (10, 20, 30, 40, 50)
    assert dimensions["tries"].levels == (0, 1, 2, 3, 4)
    assert dimensions["prune/sparsity/b.conv"].levels == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert dimensions["finetune/lr"].from_unit(0.5) == pytest.approx(10**-2.5)


def test_inactive_dimensions_count_for_nothing():
    rng = np.random.default_rng(0)
    one = SPACE.sample(rng)
    one["architecture"] = {"depth": 2, "width": 32, "kernel": 5}
    other = {**one, "architecture": {"depth": 2, "width": 16, "kernel": 3}}
    assert SPACE.key(one) == SPACE.key(other)
    assert SPACE.canonical(one)["architecture"] == {"depth": 2, "width": 16, "kernel": 3}
    names = [d.name for d, active in zip(SPACE.dimensions, SPACE.active(one), strict=True) if not active]
    assert names == ["architecture/width", "architecture/kernel"]


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"a": tune.grid_search([1, 2])}, "a: a grid_search"),
        ({"a": {"b": tune.sample_from(lambda _: 1)}}, "a/b: a function"),
        ({"a": {1: tune.uniform(0, 1)}}, "key 1"),
        ({"a": nc.when(tune.uniform(0, 1), "b", [1])}, "'b' is unknown"),
        ({"a": [tune.uniform(0, 1)]}, "a list"),
    ],
)
def test_spaces_that_cannot_be_searched_are_refused(space, says):
    with pytest.raises(ConfigError, match=says):
        Space(space)


def test_values_outside_are_named_with_what_is_allowed():
    config = SPACE.sample(np.random.default_rng(0))
    config["quantize"]["bits"]["fc"] = 5
    with pytest.raises(ConfigError, match=r"quantize/bits/fc: 5 was given, allowed: 8, 32"):
        SPACE.canonical(config)
    with pytest.raises(ConfigError, match="sparsity"):
        nc.sparsity(0.0, 1.0)
    with pytest.raises(ConfigError, match="bits"):
        nc.bits([0])


def test_features_tell_unordered_values_apart_without_an_order():
    space = Space({"kind": tune.choice(["a", "b", "c"]), "bits": tune.choice([4, 8, 32]), "x": tune.uniform(0, 2)})
    features = space.features(space.encode([{"kind": "c", "bits": 8, "x": 0.5}, {"kind": "a", "bits": 32, "x": 2.0}]))
    np.testing.assert_allclose(features, [[0, 0, 1, 0.5, 0.25], [1, 0, 0, 1, 1]])
