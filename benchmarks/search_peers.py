"""The searchers that are compared: ours, and others with the settings their own documentation recommends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ray_nascomp.pareto import ranks
from ray_nascomp.searchers import (
    AdaptiveSearch,
    BayesianSearch,
    EvolutionarySearch,
    GNNPredictorSearch,
    GoalSearcher,
    GreedySearch,
    HybridSearch,
    IterativeSearch,
    MultiStageSearch,
    RLControllerSearch,
)
from ray_nascomp.space import Space
from ray_nascomp.testing.problems import Problem

Run = Callable[[Problem, int, int], Iterator[dict[str, float]]]
"""Function (problem, seed, trials) -> the metrics of each trial, in the order in which they end."""


class RandomSearch(GoalSearcher):
    def propose(self) -> dict[str, Any]:
        return self.space.sample(self.rng)


class ConstantPredictor(GNNPredictorSearch):
    """The graph network's output replaced by the mean of what was seen."""

    def imagine(self, configs: Any, known: Any, unknown: Any, draws: int) -> np.ndarray:
        columns = [self.goal.metrics.index(metric) for metric in unknown]
        mean = np.nanmean(self.metric_table(self.final_positions())[:, columns], axis=0)
        return np.tile(mean, (draws, len(configs), 1))


class UntaughtController(RLControllerSearch):
    """The controller's output replaced by that of the start: all options alike."""

    def _learn(self, finals: list[int]) -> None:
        pass


def by_blocks(make: Callable[..., GoalSearcher]) -> Run:
    """A search by blocks; tables without sections are cut into two halves."""

    def run(problem: Problem, seed: int, trials: int) -> Iterator[dict[str, float]]:
        names = [dimension.name for dimension in Space(problem.space).dimensions]
        half = (len(names) + 1) // 2
        blocks = {"first": names[:half], "second": names[half:]}
        return ours(make, True, blocks=blocks)(problem, seed, trials)

    return run


def ours(make: Callable[..., GoalSearcher], costs: bool, parallel: int = 1, **options: Any) -> Run:
    def run(problem: Problem, seed: int, trials: int) -> Iterator[dict[str, float]]:
        searcher = make(problem.goal, problem.known if costs else None, seed=seed, **options)
        searcher.set_search_properties(None, None, dict(problem.space))
        running: list[tuple[str, dict[str, float]]] = []
        for number in range(trials):
            config: Any = searcher.suggest(str(number))
            running.append((str(number), problem.evaluate(config)))
            if len(running) == parallel:
                yield _end(searcher, *running.pop(0))
        for trial in running:
            yield _end(searcher, *trial)

    return run


def _end(searcher: GoalSearcher, trial_id: str, metrics: dict[str, float]) -> dict[str, float]:
    searcher.on_trial_complete(trial_id, {**metrics, "training_iteration": 1, "done": True})
    return metrics


def greedy(problem: Problem, seed: int, trials: int) -> Iterator[dict[str, float]]:
    assert problem.known is not None
    metric = problem.goal.objectives[-1].metric
    return ours(GreedySearch, True, metric=metric)(problem, seed, trials)


def optuna_peer(sampler: str, costs: bool = False) -> Run:
    """A sampler of Optuna; with `costs` a suggestion is refused if it is known that it cannot be on the front."""

    def run(problem: Problem, seed: int, trials: int) -> Iterator[dict[str, float]]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        goal, space = problem.goal, Space(problem.space)
        constraints = (lambda trial: trial.user_attrs["violation"]) if goal.constraints else None
        made = {
            "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, constraints_func=constraints),
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True, constraints_func=constraints),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed, constraints_func=constraints),
        }[sampler]()
        directions = ["maximize" if o.mode == "max" else "minimize" for o in goal.objectives]
        study = optuna.create_study(sampler=made, directions=directions)
        seen: dict[str, dict[str, float]] = {}

        def suggest(trial: Any) -> dict[str, Any]:
            values = []
            for dimension in space.dimensions:
                levels = dimension.levels
                assert levels is not None
                if dimension.kind != "categorical" or _is_numeric_scale(problem, dimension.is_ordinal):
                    values.append(levels[trial.suggest_int(dimension.name, 0, len(levels) - 1)])
                else:
                    values.append(trial.suggest_categorical(dimension.name, levels))
            return space.to_config(values)

        for _ in range(trials):
            for _ in range(30 if costs else 1):
                trial = study.ask()
                config = suggest(trial)
                key = space.key(config)
                if not costs or (key not in seen and not _is_hopeless(problem, config, list(seen.values()))):
                    break
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                trial = study.ask()
                config = suggest(trial)
                key = space.key(config)
            metrics = problem.evaluate(config)
            seen[key] = metrics
            trial.set_user_attr("violation", [goal.violation(metrics)])
            study.tell(trial, [metrics[o.metric] for o in goal.objectives])
            yield metrics

    return run


def _is_numeric_scale(problem: Problem, is_ordinal: bool) -> bool:
    return problem.name == "ordinal" or (problem.name.startswith(("digits", "fcnet")) and is_ordinal)


def _is_hopeless(problem: Problem, config: dict[str, Any], seen: list[dict[str, float]]) -> bool:
    """Whether it would be dominated even if all that is unknown of it were as good as the best seen."""
    if len(seen) < 2:
        return False
    losses = np.array([problem.goal.losses(metrics) for metrics in seen])
    assert problem.known is not None
    known = problem.known(config)
    best = [
        known[o.metric] * o.sign if o.metric in known else losses[:, i].min()
        for i, o in enumerate(problem.goal.objectives)
    ]
    return bool(ranks(np.vstack([losses, best]), np.zeros(len(losses) + 1))[-1] > 0)


def pymoo_nsga2(problem: Problem, seed: int, trials: int) -> Iterator[dict[str, float]]:
    """NSGA-II as in pymoo's getting started (40 and 10 offspring), with its operators for whole numbers."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.problems.static import StaticProblem

    space = Space(problem.space)
    levels = [dimension.levels or () for dimension in space.dimensions]
    bounds = np.array([len(values) - 1 for values in levels])
    asked = PymooProblem(n_var=len(levels), n_obj=len(problem.goal.objectives), xl=0 * bounds, xu=bounds, vtype=int)
    algorithm = NSGA2(
        pop_size=40,
        n_offsprings=10,
        sampling=IntegerRandomSampling(),
        crossover=SBX(prob=0.9, eta=15, vtype=float, repair=RoundingRepair()),
        mutation=PM(eta=20, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    algorithm.setup(asked, seed=seed, termination=("n_gen", 10**6), verbose=False)
    done = 0
    while done < trials:
        population = algorithm.ask()
        losses = []
        for individual in population:
            values = [options[int(index)] for options, index in zip(levels, individual.X, strict=True)]
            metrics = problem.evaluate(space.to_config(values))
            losses.append(problem.goal.losses(metrics))
            done += 1
            if done <= trials:
                yield metrics
        Evaluator().eval(StaticProblem(asked, F=np.array(losses)), population)
        algorithm.tell(infills=population)


def botorch_loop(problem: Problem, seed: int, trials: int) -> Iterator[dict[str, float]]:
    """BoTorch's tutorial on several objectives: qLogNEHVI in batches of four; values rounded to the nearest."""
    import torch
    from botorch import fit_gpytorch_mll
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.models import ModelListGP, SingleTaskGP
    from botorch.models.transforms.outcome import Standardize
    from botorch.optim import optimize_acqf
    from botorch.sampling.normal import SobolQMCNormalSampler
    from gpytorch.mlls import SumMarginalLogLikelihood

    torch.manual_seed(seed)
    space, goal = Space(problem.space), problem.goal
    inputs: list[np.ndarray] = []
    gains: list[np.ndarray] = []

    def tried(row: np.ndarray) -> dict[str, float]:
        config = space.decode(row)
        metrics = problem.evaluate(config)
        inputs.append(space.encode([config])[0])
        gains.append(-goal.losses(metrics))
        return metrics

    for row in torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed).draw(2 * (len(space) + 1)).numpy():
        yield tried(row)
    bounds = torch.stack([torch.zeros(len(space)), torch.ones(len(space))]).double()
    while len(inputs) < trials:
        x, y = torch.tensor(np.array(inputs)), torch.tensor(np.array(gains))
        models = [SingleTaskGP(x, column[:, None], outcome_transform=Standardize(m=1)) for column in y.T]
        model = ModelListGP(*models)
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model=model,
            ref_point=y.amin(dim=0).tolist(),
            X_baseline=x,
            prune_baseline=True,
            sampler=SobolQMCNormalSampler(sample_shape=torch.Size([128])),
        )
        candidates, _ = optimize_acqf(
            acquisition,
            bounds=bounds,
            q=4,
            num_restarts=10,
            raw_samples=512,
            options={"batch_limit": 5, "maxiter": 200},
            sequential=True,
        )
        for row in candidates.numpy():
            if len(inputs) < trials:
                yield tried(row)


SEARCHERS: dict[str, Run] = {
    "random": ours(RandomSearch, False),
    "optuna-nsga2": optuna_peer("nsga2"),
    "optuna-tpe": optuna_peer("tpe"),
    "optuna-tpe+costs": optuna_peer("tpe", costs=True),
    "optuna-gp": optuna_peer("gp"),
    "pymoo-nsga2": pymoo_nsga2,
    "botorch": botorch_loop,
    "evolutionary": ours(EvolutionarySearch, False),
    "evolutionary+costs": ours(EvolutionarySearch, True),
    "evolutionary+costs-screening": ours(EvolutionarySearch, True, screening=False),
    "evolutionary+costs-roles": ours(EvolutionarySearch, True, role_aware=False),
    "evolutionary+costs/8": ours(EvolutionarySearch, True, parallel=8),
    "bayesian": ours(BayesianSearch, False),
    "bayesian+costs": ours(BayesianSearch, True),
    "bayesian+costs/8": ours(BayesianSearch, True, parallel=8),
    "hybrid": ours(HybridSearch, False),
    "hybrid+costs": ours(HybridSearch, True),
    "gnn": ours(GNNPredictorSearch, False),
    "gnn+costs": ours(GNNPredictorSearch, True),
    "gnn+costs/8": ours(GNNPredictorSearch, True, parallel=8),
    "gnn+costs-network": ours(ConstantPredictor, True),
    "greedy+costs": greedy,
    "rl": ours(RLControllerSearch, False),
    "rl+costs": ours(RLControllerSearch, True),
    "rl+costs-learning": ours(UntaughtController, True),
    "rl+costs-imagination": ours(RLControllerSearch, True, imagination=False),
    "multi-stage+costs": by_blocks(MultiStageSearch),
    "iterative+costs": by_blocks(IterativeSearch),
    "adaptive+costs": by_blocks(AdaptiveSearch),
}
