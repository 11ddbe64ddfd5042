"""Small problems with known answers, on which a search of a hundred trials takes a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ray import tune

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Constraint, Goal, Objective
from ray_nascomp.pareto import normalised_hypervolume
from ray_nascomp.space import bits as choose_bits
from ray_nascomp.space import sparsity, when

_FRONT_STEPS = 4000


@dataclass(frozen=True)
class Problem:
    """A search whose every result is computed at once.

    Attributes:
        name: What it is called in tables.
        goal: Objectives and constraints.
        space: A Tune `param_space`.
        evaluate: Function from a config to all metrics of the goal.
        known: Function from a config to the metrics that need no trial, or None.
        ideal: Best loss of each objective, shape `(objectives,)`.
        nadir: Worst loss that still counts, shape `(objectives,)`.
        best: Normalised hypervolume of the true front, or None where it is not known.
        front: Results on the true front, as many as are known.
    """

    name: str
    goal: Goal
    space: Mapping[str, Any]
    evaluate: Callable[[Mapping[str, Any]], dict[str, float]]
    known: Callable[[Mapping[str, Any]], dict[str, float]] | None
    ideal: tuple[float, ...]
    nadir: tuple[float, ...]
    best: float | None = None
    front: tuple[Mapping[str, float], ...] = ()

    def hypervolume(self, results: list[Mapping[str, Any]]) -> float:
        """Hypervolume of the feasible results, in [0, 1] of the box from ideal to nadir."""
        losses = [self.goal.losses(metrics) for metrics in results if self.goal.is_feasible(metrics)]
        table = np.array(losses).reshape(-1, len(self.goal.objectives))
        return normalised_hypervolume(table, np.array(self.ideal), np.array(self.nadir))


def mixed(groups: int = 10, seed: int = 1) -> Problem:
    """Accuracy against size over sparsities, bits, a method and a learning rate; the size is known.

    The groups differ in sensitivity and in size, as the layers of a network do.

    Args:
        groups: Number of sparsities, 4 or more.
        seed: Seed of the sensitivities and sizes.

    Raises:
        ConfigError: If there are fewer than 4 groups.
    """
    if groups < 4:
        raise ConfigError(f"groups: {groups!r} was given, 4 or more is allowed")
    rng = np.random.default_rng(seed)
    sensitivity, sizes = rng.uniform(0.2, 3, groups), rng.uniform(0.2, 3, groups)

    def size(config: Mapping[str, Any]) -> dict[str, float]:
        removed = np.array(list(config["prune"]["sparsity"].values()))
        widths = np.array([*config["quantize"]["bits"].values(), *[32] * (groups - 4)])
        return {"size": float((sizes * (1 - removed) * widths / 32).sum() / sizes.sum())}

    def evaluate(config: Mapping[str, Any]) -> dict[str, float]:
        removed = np.array(list(config["prune"]["sparsity"].values()))
        widths = np.array([*config["quantize"]["bits"].values(), *[32] * (groups - 4)])
        damage = float((sensitivity * (removed**3 + 0.15 * (widths == 4))).sum() / sensitivity.sum())
        damage += 0.02 * float(np.log10(config["finetune"]["lr"]) + 2.5) ** 2
        damage += {"a": 0.0, "b": 0.02, "c": 0.04}[config["prune"]["method"]]
        return {"accuracy": float(np.exp(-2 * damage)), **size(config)}

    space = {
        "prune": {
            "sparsity": {f"layer{i}": sparsity() for i in range(groups)},
            "method": tune.choice(["a", "b", "c"]),
        },
        "quantize": {"bits": {f"layer{i}": choose_bits([4, 8, 32]) for i in range(4)}},
        "finetune": {"lr": tune.loguniform(1e-4, 1e-1)},
        "constant": 7,
    }
    goal = Goal([Objective("accuracy"), Objective("size", "min")])
    return Problem("mixed", goal, space, evaluate, size, (-1.0, 0.0), (0.0, 1.0))


def convex() -> Problem:
    """Two squared distances in one dimension (Schaffer 1985): the front is `sqrt(f1) + sqrt(f2) = 2`.

    Nothing is known of a config without a trial.
    """

    def evaluate(config: Mapping[str, Any]) -> dict[str, float]:
        away = 0.5 * float(sum(abs(config[f"y{i}"]) for i in range(4)))
        return {"f1": config["x"] ** 2 + away, "f2": (config["x"] - 2) ** 2 + away}

    space = {"x": tune.uniform(-1, 3), **{f"y{i}": tune.uniform(-1, 1) for i in range(4)}}
    goal = Goal([Objective("f1", "min"), Objective("f2", "min")])
    # 1 - (1/16) * integral of (2 - sqrt(f1))^2 over [0, 4] = 1 - (8/3)/16.
    return Problem("convex", goal, space, evaluate, None, (0.0, 0.0), (4.0, 4.0), 5 / 6)


def conditional() -> Problem:
    """A branch that is worth taking has dimensions of its own; a constraint on the known price holds it back.

    Loss falls with `wide/width` where `branch` is "wide", and is 1 elsewhere but for `bias`.
    Front: prices 0 to 6 at losses `1 - price / 10`.
    """

    def price(config: Mapping[str, Any]) -> dict[str, float]:
        return {"price": float(config["wide"]["width"]) if config["branch"] == "wide" else 0.0}

    def evaluate(config: Mapping[str, Any]) -> dict[str, float]:
        width = price(config)["price"]
        deep = 0.01 * config["deep"]["depth"] if config["branch"] == "deep" else 0.0
        return {"loss": 1 - width / 10 + deep + abs(config["bias"]), "price": width}

    space = {
        "branch": tune.choice(["none", "wide", "deep"]),
        "wide": {"width": when(tune.randint(0, 10), "branch", ["wide"])},
        "deep": {"depth": when(tune.randint(1, 5), "branch", ["deep"])},
        "bias": tune.quniform(-1, 1, 0.25),
    }
    goal = Goal([Objective("loss", "min"), Objective("price", "min")], [Constraint("price", "<=", 6)])
    losses = np.array([[1 - width / 10, width] for width in range(7)])
    best = normalised_hypervolume(losses, np.zeros(2), np.array([2.0, 10.0]))
    return Problem("conditional", goal, space, evaluate, price, (0.0, 0.0), (2.0, 10.0), best)


def ordinal(layers: int = 14, seed: int = 2) -> Problem:
    """Two ordered dimensions a layer, sparsity and bits, and accuracy against size; the size is known.

    Layers differ in size and in sensitivity, as a network's do. What a layer loses depends on that
    layer alone, so that the best plans at any price of a byte are found layer by layer.

    Args:
        layers: Number of layers; the space has twice as many dimensions.
        seed: Seed of sizes and sensitivities.
    """
    rng = np.random.default_rng(seed)
    sizes, sensitivity = rng.uniform(0.2, 3, layers), rng.uniform(0.2, 3, layers)
    levels, widths = np.arange(10) / 10, np.array([2, 4, 8, 16, 32])
    noise = {2: 0.5, 4: 0.1, 8: 0.01, 16: 0.001, 32: 0.0}

    def metrics(removed: np.ndarray, bits: np.ndarray) -> dict[str, float]:
        size = float((sizes * (1 - removed) * bits / 32).sum() / sizes.sum())
        damage = (sensitivity * (removed**3 + np.array([noise[int(b)] for b in bits]))).sum() / sensitivity.sum()
        return {"accuracy": float(np.exp(-2 * damage)), "size": size}

    def evaluate(config: Mapping[str, Any]) -> dict[str, float]:
        removed = np.array([config["prune"]["sparsity"][f"layer{i}"] for i in range(layers)])
        bits = np.array([config["quantize"]["bits"][f"layer{i}"] for i in range(layers)])
        return metrics(removed, bits)

    def size(config: Mapping[str, Any]) -> dict[str, float]:
        return {"size": evaluate(config)["size"]}

    # Sizes and damages add up over the layers: so do fronts, of which one point a step of size is kept.
    front = np.zeros((1, 2))
    for weight, harm in zip(sizes, sensitivity, strict=True):
        own = np.array([[weight * (1 - s) * b / 32, harm * (s**3 + noise[int(b)])] for s in levels for b in widths])
        sums = (front[:, None] + own[None]).reshape(-1, 2)
        sums = sums[np.lexsort(sums.T[::-1])]
        sums = sums[sums[:, 1] <= np.minimum.accumulate(sums[:, 1])]
        step = np.floor(sums[:, 0] / sizes.sum() * _FRONT_STEPS)
        front = sums[np.flatnonzero(np.diff(step, append=np.inf))]
    points = [{"accuracy": float(np.exp(-2 * d / sensitivity.sum())), "size": float(s / sizes.sum())} for s, d in front]
    space = {
        "prune": {"sparsity": {f"layer{i}": sparsity(0.0, 0.9, 0.1) for i in range(layers)}},
        "quantize": {"bits": {f"layer{i}": choose_bits(widths.tolist()) for i in range(layers)}},
    }
    goal = Goal([Objective("accuracy"), Objective("size", "min")])
    problem = Problem("ordinal", goal, space, evaluate, size, (-1.0, 0.0), (0.0, 1.0))
    return replace(problem, best=problem.hypervolume(list(points)), front=tuple(points))
