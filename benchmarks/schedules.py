"""Epochs and time that schedulers need for the hypervolume that FIFO reaches, on real learning curves.

    python benchmarks/schedules.py --curves nas_bench_nlp_wikitext2_curves.json.gz --out benchmarks/results
    python benchmarks/schedules.py --trials benchmarks/results/fidelity_digits.json --out benchmarks/results
    python benchmarks/schedules.py --trials benchmarks/results/fidelity_digits.json --largest-drop 0.03 --out ...

The very schedulers that Tune runs see recorded curves (as syne-tune's simulator does) on four workers: NAS-Bench-NLP
(345 recurrent cells on WikiText-2, Klyuchnikov et al. 2020, arXiv 2006.07116; validation loss and parameters, which
are known) or trials of `fidelity.py` (accuracy and bytes, which are known). Trials come in a random order, the same
for all schedulers. FIFO runs as many as its share of the pool, each in full; the others may use the whole pool within
FIFO's epochs. ASHA and HyperBand see one metric: the quality alone, the product with the cost, or weights in between;
the best of these in hindsight is what ours is compared with. With `--largest-drop` the accuracy may fall by so much at
most, only what keeps to that counts, and ASHA and HyperBand may also see the goal's own score.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, TrialScheduler

from ray_nascomp import Constraint, Goal, Objective
from ray_nascomp.pareto import hypervolume
from ray_nascomp.schedulers import FeasibilityScheduler, ParetoASHAScheduler

WORKERS = 4
SHARES = (0.1, 0.25, 0.5, 1.0)
_LARGEST_DROP = 0.1
"""Accuracy lost from which on a trial is worth nothing."""


@dataclass(frozen=True)
class Pool:
    """Recorded trials: qualities and costs as losses in [0, 1], seconds of each step, and the worst quality allowed."""

    name: str
    quality: list[list[float]]
    cost: list[float]
    seconds: list[float]
    fifo_trials: int
    worst: float = 1.0

    @property
    def goal(self) -> Goal:
        constraints = [Constraint("quality", "<=", self.worst)] if self.worst < 1 else []
        return Goal([Objective("quality", "min"), Objective("cost", "min")], constraints)

    @property
    def steps(self) -> int:
        return max(map(len, self.quality))


class Replay:
    """Plays recorded trials under a scheduler; it is the scheduler's tune_controller."""

    def __init__(self, pool: Pool, order: np.ndarray, scheduler: TrialScheduler) -> None:
        self.pool, self.scheduler = pool, scheduler
        self.trials = [Trial("replay", stub=True, config={"row": int(row)}, trial_id=f"t{row}") for row in order]
        self.live: dict[str, Trial] = {trial.trial_id: trial for trial in self.trials}
        self.done = dict.fromkeys(self.live, 0)
        scheduler.set_search_properties(None, None)
        for trial in self.trials:
            scheduler.on_trial_add(self, trial)

    def get_trials(self) -> list[Trial]:
        return list(self.live.values())

    def stop_trial(self, trial: Trial) -> None:
        if trial.trial_id in self.live:
            paused = trial.status in (Trial.PENDING, Trial.PAUSED)
            self.end(trial)
            if paused:
                self.scheduler.on_trial_remove(self, trial)

    def end(self, trial: Trial) -> None:
        trial.status = Trial.TERMINATED
        self.live.pop(trial.trial_id, None)

    def results(self) -> Iterator[tuple[float, float, float]]:
        """(seconds, quality, cost) of every report in the order of time."""
        queue: list[tuple[float, int, Trial]] = []
        now, started = 0.0, 0
        while True:
            while len(queue) < WORKERS:
                trial = self.scheduler.choose_trial_to_run(self)
                if trial is None:
                    break
                trial.status = Trial.RUNNING
                started += 1
                heapq.heappush(queue, (now + self.pool.seconds[trial.config["row"]], started, trial))
            if not queue:
                return
            now, number, trial = heapq.heappop(queue)
            row = trial.config["row"]
            time = self.done[trial.trial_id] = self.done[trial.trial_id] + 1
            quality, cost = self.pool.quality[row][time - 1], self.pool.cost[row]
            yield now, quality, cost
            result = report(self.pool.goal, quality, cost, time)
            if time == len(self.pool.quality[row]):
                self.end(trial)
                self.scheduler.on_trial_complete(self, trial, result)
                continue
            decision = self.scheduler.on_trial_result(self, trial, result)
            trial.update_last_result({**result, "trial_id": trial.trial_id})
            if decision == TrialScheduler.CONTINUE:
                heapq.heappush(queue, (now + self.pool.seconds[row], number, trial))
            elif decision == TrialScheduler.PAUSE:
                trial.status = Trial.PAUSED
            elif trial.trial_id in self.live:
                self.end(trial)
                self.scheduler.on_trial_complete(self, trial, result)


def report(goal: Goal, quality: float, cost: float, time: int) -> dict[str, Any]:
    known = {"quality": quality, "cost": cost, "training_iteration": time}
    scalars = {f"weighted_{weight:g}": (1 - weight) * quality + weight * cost for weight in (0.0, 0.1, 0.25, 0.5)}
    if goal.constraints:
        scalars["minus_score"] = -goal.score(known)
    return {**known, "product": quality * cost, **scalars}


def nas_bench_nlp(path: Path) -> Pool:
    rows = [row for row in json.loads(gzip.decompress(path.read_bytes())) if row["status"] == "OK"]
    losses, params = np.array([row["val_losses"] for row in rows]), np.array([row["num_params"] for row in rows])
    best, worst = losses.min(), float(np.quantile(losses[:, -1], 0.75))
    return Pool(
        "nlp",
        ((losses - best) / (worst - best)).tolist(),
        ((params - params.min()) / (params.max() - params.min())).tolist(),
        [float(np.mean(row["wall_times"])) for row in rows],
        fifo_trials=80,
    )


def recorded_trials(path: Path, largest_drop: float) -> Pool:
    record = json.loads(path.read_text())
    rows = record["trials"]
    drop, size = np.array([row["accuracy_drop"] for row in rows]), np.log([row["size_mb"] for row in rows])
    best = float(drop.min())
    return Pool(
        record["task"],
        ((drop - best) / (_LARGEST_DROP - best)).tolist(),
        ((size - size.min()) / (size.max() - size.min())).tolist(),
        [row["seconds"] / len(row["accuracy"]) for row in rows],
        fifo_trials=len(rows) // 3,
        worst=(min(largest_drop, _LARGEST_DROP) - best) / (_LARGEST_DROP - best),
    )


def schedulers(pool: Pool) -> dict[str, Callable[[], TrialScheduler]]:
    goal, steps = pool.goal, pool.steps
    made: dict[str, Callable[[], TrialScheduler]] = {"fifo": FIFOScheduler}
    for metric in [name for name in report(goal, 0.0, 0.0, 1) if name.startswith(("weighted", "product", "minus"))]:
        named = {"metric": metric, "mode": "min", "max_t": steps, "reduction_factor": 3}
        made[f"asha {metric}"] = lambda named=named: ASHAScheduler(grace_period=1, **named)
        made[f"hyperband {metric}"] = lambda named=named: HyperBandScheduler(**named)
    if goal.constraints:
        made["feasibility"] = lambda: FeasibilityScheduler(goal, steps)
    for grace in (1, 2, 3):
        made[f"pareto_asha grace {grace}"] = lambda grace=grace: ParetoASHAScheduler(goal, steps, grace)
    return made


def curve(pool: Pool, seed: int, make: Callable[[], TrialScheduler], limit: int) -> list[tuple[float, float]]:
    """(seconds, hypervolume) after each epoch, up to a number of epochs."""
    order = np.random.default_rng(seed).permutation(len(pool.quality))
    replay = Replay(pool, order, make())
    front = np.empty((0, 2))
    values: list[tuple[float, float]] = []
    best = 0.0
    for seconds, quality, cost in replay.results():
        point = np.array([quality, cost])
        if math.isfinite(quality) and not (front <= point).all(axis=1).any():
            front = np.vstack([front[~(front >= point).all(axis=1)], point])
            best = hypervolume(front, np.array([pool.worst, 1.0001])) / pool.worst
        values.append((seconds, best))
        if len(values) == limit:
            break
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, help="NAS-Bench-NLP's curves, .json.gz")
    parser.add_argument("--trials", type=Path, help="output of fidelity.py")
    parser.add_argument("--largest-drop", type=float, default=_LARGEST_DROP, help="of trials' accuracy (default: 0.1)")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="folder for the raw output")
    arguments = parser.parse_args()
    if arguments.trials is not None:
        pool = recorded_trials(arguments.trials, arguments.largest_drop)
    elif arguments.curves is not None and arguments.curves.exists():
        pool = nas_bench_nlp(arguments.curves)
    else:
        print("skipped: neither --curves nor --trials names a file")
        return
    logging.getLogger("ray.tune.schedulers").setLevel(logging.WARNING)
    limit = pool.fifo_trials * pool.steps
    runs: dict[str, list[dict[str, Any]]] = {}
    fifo: dict[int, float] = {}
    for name, make in schedulers(pool).items():
        runs[name] = []
        for seed in range(arguments.seeds):
            values = curve(pool, seed, make, limit)
            fifo.setdefault(seed, values[-1][1])
            reached = next((i for i, (_, value) in enumerate(values) if value >= fifo[seed] - 1e-12), None)
            runs[name].append(
                {
                    "seed": seed,
                    "epochs_to_fifo": None if reached is None else reached + 1,
                    "seconds_to_fifo": None if reached is None else round(values[reached][0], 1),
                    "hypervolume": [round(values[min(len(values), round(s * limit)) - 1][1], 5) for s in SHARES],
                }
            )
    record = {"pool": pool.name, "epochs": limit, "shares": SHARES, "runs": runs}
    drop = f"_drop{100 * arguments.largest_drop:g}" if pool.worst < 1 else ""
    (arguments.out / f"schedules_{pool.name}{drop}.json").write_text(json.dumps(record) + "\n")
    fifo_seconds = np.mean([run["seconds_to_fifo"] for run in runs["fifo"]])
    for name, rows in runs.items():
        epochs = [row["epochs_to_fifo"] for row in rows]
        failed = epochs.count(None)
        share = np.median([limit if e is None else e for e in epochs]) / np.median(
            [run["epochs_to_fifo"] for run in runs["fifo"]]
        )
        seconds = [row["seconds_to_fifo"] for row in rows if row["seconds_to_fifo"] is not None]
        values = np.mean([row["hypervolume"] for row in rows], axis=0).round(4).tolist()
        time = f"{np.mean(seconds) / fifo_seconds:.2f}" if seconds else "-"
        print(f"{name:28} epochs {share:.2f} time {time} failed {failed:2} hypervolume", values, flush=True)


if __name__ == "__main__":
    main()
