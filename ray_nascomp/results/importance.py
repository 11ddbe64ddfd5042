"""Which dimensions matter for which objective, from a fitted forest.

Permutation importance (Breiman 2001, "Random Forests") of forests that predict the objectives
from the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import as_float

if TYPE_CHECKING:
    from ray_nascomp.results.results import Results

FEWEST_TRIALS = 10
_TREES = 50
_REPEATS = 5


def importance_table(results: Results, seed: int = 0) -> pd.DataFrame:
    """Share of each searched dimension in what changes each objective.

    Args:
        results: The results; only completed trials count.
        seed: Seed of the forests and permutations.

    Returns:
        Dimensions as rows, the most important for the first objective on top; objectives as
        columns, each of which sums to 1, or is 0 where the objective did not depend on anything.

    Raises:
        ConfigError: If scikit-learn is not installed, or too few trials have been completed.
    """
    from ray_nascomp.results.results import flat

    try:
        from sklearn.ensemble import RandomForestRegressor
        from sklearn.inspection import permutation_importance
    except ImportError as error:
        raise ConfigError("importance: scikit-learn is needed, pip install 'ray-nascomp[importance]'") from error
    objectives = [objective.metric for objective in results.goal.objectives]
    trials = [
        trial
        for trial in results.trials
        if trial.status == "completed" and np.isfinite(results.goal.losses(trial.metrics)).all()
    ]
    if len(trials) < FEWEST_TRIALS:
        raise ConfigError(f"importance: {len(trials)} trials have been completed, {FEWEST_TRIALS} are needed")
    configs = [flat(trial.config) for trial in trials]
    columns = {
        key: column
        for key in dict.fromkeys(name for config in configs for name in config)
        if len(set(column := _encode([config.get(key) for config in configs]))) > 1
    }
    if not columns:
        raise ConfigError("importance: all completed trials have the same config")
    inputs = np.array(list(columns.values())).T
    table = pd.DataFrame(index=pd.Index(columns, name="dimension"))
    for metric in objectives:
        values = np.array([as_float(trial.metrics[metric]) for trial in trials])
        forest = RandomForestRegressor(_TREES, random_state=seed).fit(inputs, values)
        drops = permutation_importance(forest, inputs, values, n_repeats=_REPEATS, random_state=seed).importances_mean
        drops = np.maximum(drops, 0.0)
        table[metric] = drops / (drops.sum() or 1.0)
    return table.sort_values(objectives[0], ascending=False)


def _encode(values: Sequence[Any]) -> list[float]:
    """A dimension's values as numbers: themselves, or their place among all by name."""
    numbers = [float(v) if isinstance(v, bool) else as_float(v) for v in values]
    if np.isfinite(numbers).all():
        return numbers
    names = sorted(set(map(str, values)))
    return [float(names.index(str(value))) for value in values]
