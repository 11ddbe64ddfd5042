"""What a search could reach at most that had learnt from other networks already: NAS-Bench-201.

    python benchmarks/search_bound.py --seeds 5 --out benchmarks/results

Accuracy and latency of each network are predicted by extremely randomised trees (Geurts et al. 2006)
from four fifths of the table that do not hold it, 12,500 networks; its size is known. Each trial is
the network, of all 15,625, with the largest expected gain in hypervolume by these predictions and
their local error. No search starts with so much: what this one misses is noise of the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import KFold, cross_val_predict

sys.path.insert(0, str(Path(__file__).parent))
from search_problems import PROBLEMS, measures
from search_quality import CHECKPOINTS

from ray_nascomp.space import Space

_FIRST, _DRAWS, _NEIGHBOURS = 5, 8, 401


def predicted(inputs: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, what is foretold by the others, and how far such predictions are from the truth."""
    folds = KFold(5, shuffle=True, random_state=0)
    mean = cross_val_predict(ExtraTreesRegressor(200, min_samples_leaf=2, random_state=0), inputs, values, cv=folds)
    order = np.argsort(mean)
    error = np.empty(len(mean))
    errors = pd.Series((values - mean)[order])
    error[order] = errors.rolling(_NEIGHBOURS, center=True, min_periods=_NEIGHBOURS // 4).std().to_numpy()
    return mean, error


def search(gains: torch.Tensor, mean: torch.Tensor, error: torch.Tensor, seed: int, trials: int) -> list[int]:
    """Rows in the order in which they are tried; all in the unit cube, more is better, shape `(rows, objectives)`."""
    generator = torch.Generator().manual_seed(seed)
    tried = torch.randint(len(gains), (_FIRST,), generator=generator).tolist()
    while len(tried) < trials:
        cells = FastNondominatedPartitioning(gains[tried].amin(dim=0) - 0.1, gains[tried]).get_hypercell_bounds()
        total = torch.zeros(len(gains), dtype=torch.double)
        for _ in range(_DRAWS):
            drawn = mean + error * torch.randn(mean.shape, generator=generator, dtype=torch.double)
            total += (torch.minimum(drawn[:, None], cells[1]) - cells[0]).clamp_min(0).prod(dim=-1).sum(dim=-1)
        total[tried] = -1
        tried.append(int(total.argmax()))
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    record = {}
    for name in (problem for problem in PROBLEMS if problem.startswith("nb201")):
        problem, _ = PROBLEMS[name]()
        space = Space(problem.space)
        configs = [space.to_config(list(v)) for v in itertools.product(*(d.levels or () for d in space.dimensions))]
        rows = [problem.evaluate(config) for config in configs]
        boxes = measures(problem, rows)
        gains = np.array([-problem.goal.losses(row) for row in rows])
        inputs = space.features(space.encode(configs))
        foretold = [
            (column, np.zeros(len(rows))) if objective.metric == "model_size" else predicted(inputs, column)
            for column, objective in zip(gains.T, problem.goal.objectives, strict=True)
        ]
        low, span = gains.min(axis=0), np.ptp(gains, axis=0)
        mean = torch.tensor((np.stack([m for m, _ in foretold], axis=1) - low) / span)
        error = torch.tensor(np.stack([e for _, e in foretold], axis=1) / span)
        runs = []
        for seed in range(arguments.seeds):
            tried = search(torch.tensor((gains - low) / span), mean, error, seed, CHECKPOINTS[-1])
            found = [rows[i] for i in tried]
            runs.append({box: [share(found[:n]) for n in CHECKPOINTS] for box, share in boxes.items()})
            print(name, seed, runs[-1], flush=True)
        explained = {
            objective.metric: round(1 - float(np.var(column - m) / np.var(column)), 3)
            for column, (m, _), objective in zip(gains.T, foretold, problem.goal.objectives, strict=True)
        }
        record[name] = {"checkpoints": CHECKPOINTS, "explained_variance": explained, "runs": runs}
        (arguments.out / "search_bound.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
