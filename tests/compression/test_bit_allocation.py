from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_nascomp.compression.bit_allocation import allocate_bits
from ray_nascomp.errors import ConfigError

numbers = st.floats(0, 1000, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def problems(draw):
    layers = draw(st.lists(st.lists(st.sampled_from([2, 4, 8, 32]), min_size=1, unique=True), min_size=1, max_size=4))
    tables = [{f"layer{i}": {b: draw(numbers) for b in bits} for i, bits in enumerate(layers)} for _ in range(2)]
    return tables[0], tables[1], draw(st.floats(0, 1))


@settings(max_examples=80, deadline=None)
@given(problems())
def test_no_other_choice_within_the_budget_is_better(problem):
    sensitivity, cost, share = problem
    least = sum(min(values.values()) for values in cost.values())
    most = sum(max(values.values()) for values in cost.values())
    budget = least + share * (most - least)

    def total(table, chosen):
        return sum(table[name][bits] for name, bits in zip(table, chosen, strict=True))

    every = itertools.product(*sensitivity.values())
    best = min(total(sensitivity, chosen) for chosen in every if total(cost, chosen) <= budget * (1 + 1e-9))
    found = allocate_bits(sensitivity, cost, budget)
    assert list(found) == list(sensitivity)
    assert total(cost, found.values()) <= budget * (1 + 1e-6) + 1e-6
    assert total(sensitivity, found.values()) <= best + 1e-3


def test_bits_go_where_they_help_most():
    sensitivity = {"first": {4: 5.0, 8: 0.1}, "middle": {4: 0.2, 8: 0.1}, "last": {4: 1.0, 8: 0.0}}
    cost = {name: {4: 40.0, 8: 80.0} for name in sensitivity}
    assert allocate_bits(sensitivity, cost, 200.0) == {"first": 8, "middle": 4, "last": 8}
    assert allocate_bits(sensitivity, cost, 199.0) == {"first": 8, "middle": 4, "last": 4}
    assert allocate_bits(sensitivity, cost, math.inf) == dict.fromkeys(sensitivity, 8)


def test_a_hundred_layers_with_costs_of_megabytes_stay_within_the_budget():
    generator = np.random.default_rng(0)
    names = [f"layer{i}" for i in range(100)]
    weights = generator.integers(1_000, 3_000_000, 100)
    sensitivity = {name: {bits: generator.random() / bits**2 for bits in (2, 4, 8, 32)} for name in names}
    cost = {name: {bits: float(w * bits) for bits in (2, 4, 8, 32)} for name, w in zip(names, weights, strict=True)}
    budget = 6.0 * weights.sum()
    found = allocate_bits(sensitivity, cost, budget)
    spent = sum(cost[name][bits] for name, bits in found.items())
    assert 0.99 * budget < spent <= budget * (1 + 1e-6)
    uniform = sum(sensitivity[name][4] for name in names)
    assert sum(sensitivity[name][bits] for name, bits in found.items()) < uniform


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_possible():
    with pytest.raises(ConfigError, match="70 was given, the least that all layers can cost is 80"):
        allocate_bits({"a": {4: 1.0, 8: 0.0}, "b": {4: 1.0}}, {"a": {4: 40.0, 8: 80.0}, "b": {4: 40.0}}, 70.0)


@pytest.mark.parametrize(
    ("sensitivity", "cost", "message"),
    [
        ({"a": {4: 1.0}}, {"b": {4: 1.0}}, "same layers"),
        ({"a": {4: 1.0}}, {"a": {8: 1.0}}, "the same bits"),
        ({"a": {4: math.nan}}, {"a": {4: 1.0}}, r"bits\.a\.4.*sensitivity of nan"),
    ],
)
def test_tables_that_do_not_match_are_refused(sensitivity, cost, message):
    with pytest.raises(ConfigError, match=message):
        allocate_bits(sensitivity, cost, 10.0)


def test_nothing_to_allocate_is_no_mistake():
    assert allocate_bits({}, {}, 0.0) == {}
