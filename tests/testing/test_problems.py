from __future__ import annotations

import itertools

import numpy as np
import pytest

from ray_nascomp.errors import ConfigError
from ray_nascomp.space import Space
from ray_nascomp.testing.problems import conditional, convex, mixed, ordinal


def test_the_convex_problems_front_has_the_volume_that_it_says():
    problem = convex()
    points = [{"x": x, "y0": 0.0, "y1": 0.0, "y2": 0.0, "y3": 0.0} for x in np.linspace(0, 2, 2001)]
    found = problem.hypervolume([problem.evaluate(point) for point in points])
    assert problem.best == pytest.approx(5 / 6)
    assert found == pytest.approx(problem.best, abs=1e-3)


@pytest.mark.parametrize("problem", [mixed(), convex(), conditional(), ordinal()], ids=lambda p: p.name)
def test_no_config_is_beyond_the_front_and_known_metrics_are_exact(problem):
    rng = np.random.default_rng(0)
    space = Space(problem.space)
    configs = [space.sample(rng) for _ in range(500)]
    results = [problem.evaluate(config) for config in configs]
    assert 0.02 < problem.hypervolume(results) < (problem.best or 1.0) + 1e-12
    losses = np.array([problem.goal.losses(metrics) for metrics in results])
    assert (losses >= np.array(problem.ideal)).all()
    if problem.known is not None:
        for config, metrics in zip(configs, results, strict=True):
            assert problem.known(config).items() <= metrics.items()


def test_the_conditional_problems_front_respects_its_constraint():
    problem = conditional()
    widths = [{"branch": "wide", "wide": {"width": w}, "deep": {"depth": 1}, "bias": 0.0} for w in range(10)]
    results = [problem.evaluate(config) for config in widths]
    assert problem.hypervolume(results) == pytest.approx(problem.best)
    assert [problem.goal.is_feasible(r) for r in results] == [w <= 6 for w in range(10)]


def test_too_few_groups_are_refused():
    with pytest.raises(ConfigError, match="groups: 3"):
        mixed(3)


def test_the_ordinal_problems_front_is_that_of_all_its_configs():
    problem = ordinal(layers=2)
    space = Space(problem.space)
    every = itertools.product(*(dimension.levels for dimension in space.dimensions))
    found = problem.hypervolume([problem.evaluate(space.to_config(values)) for values in every])
    assert problem.best == pytest.approx(found, abs=1e-4)
    assert problem.hypervolume(list(problem.front)) == problem.best
