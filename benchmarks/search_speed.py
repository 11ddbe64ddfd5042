"""What a suggestion costs, in a space of 30 dimensions and two objectives of which one is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_nascomp.searchers import BayesianSearch, EvolutionarySearch, GNNPredictorSearch, RLControllerSearch
from ray_nascomp.testing.problems import ordinal

SIZES = {
    "evolutionary+costs": (EvolutionarySearch, (100, 1000)),
    "rl+costs": (RLControllerSearch, (100, 1000)),
    "gnn+costs": (GNNPredictorSearch, (100, 200)),
    "bayesian+costs": (BayesianSearch, (100, 500)),
}
"""Searcher -> its class, and the numbers of observations at which it is timed."""

_SUGGESTIONS = 24


def measure_speed(searchers: Sequence[str]) -> dict[str, Any]:
    """CPU milliseconds of a suggestion and of a result, after so many random results.

    The first suggestion, before which a model has never been fitted, does not count.
    """
    record: dict[str, Any] = {}
    problem = ordinal(layers=15)
    for name, (make, sizes) in SIZES.items():
        if name not in searchers:
            continue
        for size in sizes:
            searcher: Any = make(problem.goal, problem.known, seed=0)
            searcher.set_search_properties(None, None, dict(problem.space))
            rng = np.random.default_rng(0)
            suggested, told = [], []
            for number in range(size + _SUGGESTIONS):
                start = time.process_time()
                if number < size:
                    config = searcher.space.sample(rng)
                    searcher._pending[str(number)] = config
                else:
                    config = searcher.suggest(str(number))
                    suggested.append(time.process_time() - start)
                start = time.process_time()
                searcher.on_trial_complete(str(number), {**problem.evaluate(config), "training_iteration": 1})
                told.append(time.process_time() - start)
            record[f"{name} at {size}"] = {
                "suggest_median_ms": round(1e3 * float(np.median(suggested[1:])), 2),
                "suggest_mean_ms": round(1e3 * float(np.mean(suggested[1:])), 2),
                "suggest_longest_ms": round(1e3 * max(suggested[1:]), 2),
                "complete_median_ms": round(1e3 * float(np.median(told[size:])), 2),
            }
            print(name, size, record[f"{name} at {size}"], flush=True)
    return record
