"""What a search's results are best chosen by, accuracy or divergence, where validation samples are few.

python selection.py language --data folder-of-sentence-polarity --output case_output --seed 0

The validation samples are drawn into halves. Of all completed results of a study's search one is chosen on one half,
and judged by its accuracy on the other. No test sample is looked at.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import numpy as np
import torch
from study import Study
from torch.nn.functional import log_softmax

import ray_nascomp as nc
from ray_nascomp.deployment.runtime import make_session
from ray_nascomp.pipeline.measure import file_predictor

DRAWS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="name of the case, one that tells classes")
    parser.add_argument("--data", type=Path, default=Path(), help="where the data are")
    parser.add_argument("--output", type=Path, default=Path("case_output"), help="folder of the studies")
    parser.add_argument("--seed", type=int, default=0, help="the study's seed")
    parser.add_argument("--quick", action="store_true", help="of a quick study")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    case = importlib.import_module(arguments.case).CASE
    study = Study(case, arguments.data, arguments.output, arguments.seed, quick=arguments.quick)
    figures = {"case": case.name, "seed": arguments.seed, **compare(study)}
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


def compare(study: Study) -> dict[str, object]:
    """Mean accuracy, on the other half, of what is chosen on one half; of the best there is, and of all."""
    results = nc.Results(study.folder / "search", study.goal)
    names = [trial.trial_id for trial in results.trials if trial.status == "completed"]
    task = study.task
    known, targets = outputs_of(study.whole.content, task.original or task)
    right, far = [], []
    for name in names:
        found, _ = outputs_of(results.trial(name).content(), task)
        right.append((found.argmax(-1) == targets).double().numpy())
        far.append((known.exp() * (known - found)).sum(-1).numpy())
    accuracy, divergence = np.array(right), np.array(far)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(DRAWS):
        order = rng.permutation(len(targets))
        one, other = order[: len(order) // 2], order[len(order) // 2 :]
        judged = accuracy[:, other].mean(1)
        chosen = accuracy[:, one].mean(1).argmax(), divergence[:, one].mean(1).argmin()
        rows.append((*judged[list(chosen)], judged.max(), judged.mean()))
    means = dict(zip(("by accuracy", "by divergence", "the best", "all"), np.mean(rows, axis=0).round(4), strict=True))
    return {
        "results": len(names),
        "samples": len(targets),
        "draws": DRAWS,
        "accuracy on the other half": means,
        "trials": {
            name: {"accuracy": round(float(a.mean()), 4), "divergence": round(float(d.mean()), 4)}
            for name, a, d in zip(names, accuracy, divergence, strict=True)
        },
    }


def outputs_of(content: bytes, task: nc.Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of a file's probabilities on the validation data, and the targets."""
    outputs, targets = task.outputs(file_predictor(make_session(content), task), task.val_data)
    return log_softmax(outputs.double(), -1), targets


if __name__ == "__main__":
    main()
