"""Bayesian optimisation over several objectives, with exact known costs.

Gaussian processes learn the metrics that only trials tell; those that the cost model knows enter
as deterministic functions. The next config maximises the log noisy expected hypervolume
improvement (Daulton et al. 2021, arXiv 2105.08195; Ament et al. 2023, arXiv 2310.20708) over a
pool of neighbours of the best results and of random configs, so that mixed spaces and costs
without gradients need no relaxation. Results of trials that were stopped early enter with their
share of the full length as one more input (Kandasamy et al. 2017, arXiv 1703.06240).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ray_nascomp.errors import ConfigError
from ray_nascomp.goals import Constraint, Goal, as_float
from ray_nascomp.observations import Observation, Status
from ray_nascomp.pareto import ranks
from ray_nascomp.searchers.base import CostFunction, GoalSearcher
from ray_nascomp.searchers.operators import Variation
from ray_nascomp.searchers.scaling import UnitScale

if TYPE_CHECKING:
    import torch
    from botorch.models import SingleTaskGP
    from botorch.posteriors.torch import TorchPosterior

_POOL = 160
_RANDOM_SHARE = 0.25
_BASELINE = 24
_CROSSOVER = 0.4
_FIT_ROWS = 256
_FIT_STEPS = 60
# A process costs the cube of its rows: a search of thousands of trials learns from the best and the newest.
_ROWS = 600


class BayesianSearch(GoalSearcher):
    """Bayesian optimisation with BoTorch; needs the extra `ray-nascomp[bayesian]`.

    Args:
        goal: See `GoalSearcher`.
        cost_model: See `GoalSearcher`.
        initial: Number of random configs before the first model, 3 or more.
        seed: See `GoalSearcher`.
        points_to_evaluate: See `GoalSearcher`.
        warm_start: See `GoalSearcher`.

    Raises:
        ConfigError: If an argument is not allowed, or BoTorch is not installed.
    """

    def __init__(
        self,
        goal: Goal,
        cost_model: CostFunction | None = None,
        *,
        initial: int = 10,
        seed: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        warm_start: Iterable[Observation] | str | Path | Any = None,
    ) -> None:
        from importlib.util import find_spec

        if initial < 3:
            raise ConfigError(f"initial: {initial!r} was given, 3 or more is allowed")
        if find_spec("botorch") is None:
            raise ConfigError("BayesianSearch: BoTorch is not installed; pip install 'ray-nascomp[bayesian]'")
        super().__init__(goal, cost_model, seed=seed, points_to_evaluate=points_to_evaluate, warm_start=warm_start)
        self._initial = initial
        self._fitted_at = 0
        self._hyperparameters: dict[str, dict[str, Any]] = {}

    @cached_property
    def variation(self) -> Variation:
        """The operators of the space."""
        return Variation(self.space.dimensions)

    def propose(self) -> dict[str, Any]:
        """A random config at first, then the one of a pool with the largest expected gain."""
        finals = self.final_observations()
        usable = [o for o in finals if np.isfinite(self.goal.losses(o.metrics)).all()]
        if len(usable) < 3 or len(self.observations) + len(self._pending) < self._initial:
            return self.spread()
        pool = self._pool(usable)
        if not pool:
            return self.space.sample(self.rng)
        from botorch.utils.sampling import manual_seed
        from linear_operator.utils.warnings import NumericalWarning

        with manual_seed(int(self.rng.integers(2**31))), warnings.catch_warnings():
            # The jitter that results close to each other need.
            warnings.simplefilter("ignore", NumericalWarning)
            return pool[self._most_promising(pool, usable)]

    def own_state(self) -> dict[str, Any]:
        """The models' hyperparameters: they are fitted now and then only."""
        return {"fitted_at": self._fitted_at, "hyperparameters": self._hyperparameters}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes back the models' hyperparameters."""
        self._fitted_at = state["fitted_at"]
        self._hyperparameters = state["hyperparameters"]

    def _pool(self, usable: list[Observation]) -> list[dict[str, Any]]:
        """New, affordable configs: children of the best results, and random ones."""
        best = self.space.encode([o.config for o in self._best(usable, _BASELINE)])
        count = round((1 - _RANDOM_SHARE) * _POOL)
        first, second = self.rng.integers(len(best), size=(2, count))
        crossed = self.variation.crossover(self.rng, best[first], best[second])
        parents = np.where(self.rng.random((count, 1)) < _CROSSOVER, crossed, best[first])
        drafts = self.space.decode_many(self.variation.mutate(self.rng, parents))
        drafts += [self.space.sample(self.rng) for _ in range(_POOL - count)]
        affordable = [c for c, known in zip(drafts, self.foresee(drafts), strict=True) if known is not None]
        return list({self.key(config): config for config in affordable if self.is_new(config)}.values())

    def _best(self, usable: list[Observation], count: int) -> list[Observation]:
        losses = np.stack([self.goal.losses(o.metrics) for o in usable])
        violations = np.array([self.goal.violation(o.metrics) for o in usable])
        order = np.argsort(ranks(losses, violations), kind="stable")
        return [usable[i] for i in order[:count]]

    def _worth_learning(self, usable: list[Observation]) -> list[Observation]:
        """At most `_ROWS` of them: the better half by rank, and the newest of the others."""
        if len(usable) <= _ROWS:
            return usable
        best = {id(o) for o in self._best(usable, _ROWS // 2)}
        newest = {id(o) for o in [o for o in usable if id(o) not in best][-_ROWS // 2 :]}
        return [o for o in usable if id(o) in best | newest]

    def _most_promising(self, pool: list[dict[str, Any]], usable: list[Observation]) -> int:
        """Position in the pool of the largest acquisition value."""
        import torch
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
        from botorch.models import ModelList
        from botorch.models.deterministic import GenericDeterministicModel
        from botorch.sampling.get_sampler import get_sampler

        inputs = _Inputs(self, self._worth_learning(usable))
        models = []
        for column, metric in enumerate(self.goal.metrics):
            if metric in inputs.known:
                position = inputs.width + inputs.known.index(metric)
                models.append(GenericDeterministicModel(partial(_column, position)))
            else:
                models.append(self._model(metric, inputs, column))
        self._fitted_at = self._due() or self._fitted_at
        signs = torch.tensor([-o.sign for o in self.goal.objectives], dtype=torch.double)
        chosen = [self.goal.metrics.index(o.metric) for o in self.goal.objectives]
        feasible = [o for o in usable if self.goal.is_feasible(o.metrics)] or usable
        gains = inputs.scaled([o.metrics for o in feasible])[:, chosen] * signs
        low, high = gains.amin(dim=0), gains.amax(dim=0)
        model = ModelList(*models)
        baseline = inputs.rows([o.config for o in self._best(usable, _BASELINE)])
        samples = torch.Size([32 if len(chosen) < 3 else 16])
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model=model,
            ref_point=low - 0.1 * (high - low).clamp_min(1e-3),
            X_baseline=baseline,
            sampler=get_sampler(cast("TorchPosterior", model.posterior(baseline[:1])), sample_shape=samples, seed=0),
            objective=GenericMCMultiOutputObjective(lambda y, **_: y[..., chosen] * signs),
            constraints=[inputs.slack(constraint) for constraint in self.goal.constraints] or None,
            X_pending=inputs.rows(self.pending) if self.pending else None,
            prune_baseline=False,
            cache_root=False,
        )
        with torch.no_grad():
            values = acquisition(inputs.rows(pool).unsqueeze(-2))
        return int(values.nan_to_num(nan=-torch.inf).argmax())

    def _due(self) -> int:
        """Number of observations if hyperparameters have to be fitted again, else 0."""
        count = len(self.observations)
        step = max(4, count // 8)
        return count if not self._fitted_at or count - self._fitted_at >= step else 0

    def _model(self, metric: str, inputs: _Inputs, column: int) -> SingleTaskGP:
        from botorch.exceptions.warnings import OptimizationWarning
        from botorch.optim.fit import fit_gpytorch_mll_scipy
        from gpytorch.mlls import ExactMarginalLogLikelihood

        if self._due() or metric not in self._hyperparameters:
            rows = np.linspace(0, len(inputs.train) - 1, min(_FIT_ROWS, len(inputs.train))).astype(int)
            fitted = inputs.process(column, rows)
            if metric in self._hyperparameters:
                _set_parameters(fitted, self._hyperparameters[metric])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizationWarning)
                fit_gpytorch_mll_scipy(
                    ExactMarginalLogLikelihood(fitted.likelihood, fitted), options={"maxiter": _FIT_STEPS}
                )
            self._hyperparameters[metric] = {name: value.tolist() for name, value in fitted.named_parameters()}
        model: SingleTaskGP = inputs.process(column, np.arange(len(inputs.train)))
        _set_parameters(model, self._hyperparameters[metric])
        model.eval()
        return model


def _set_parameters(model: SingleTaskGP, values: Mapping[str, Any]) -> None:
    import torch

    for name, parameter in model.named_parameters():
        parameter.data = torch.tensor(values[name], dtype=torch.double).reshape(parameter.shape)


def _column(position: int, rows: torch.Tensor) -> torch.Tensor:
    return rows[..., position : position + 1]


class _Inputs:
    """Configs and results as the models see them.

    A row holds the encoded dimensions (unordered categoricals one-hot), the share of the full
    length, all known metrics in the scale of the dimensions, and then the goal's known metrics,
    standardised; the processes see all but the last part.
    """

    def __init__(self, searcher: BayesianSearch, usable: list[Observation]) -> None:
        import torch

        self._searcher = searcher
        self.known = [m for m in searcher.goal.metrics if m in (searcher.known_metrics(usable[0].config) or {})]
        self._scale_of_costs = UnitScale(searcher.known_values([o.config for o in usable]))
        final = self._metrics_of([o.metrics for o in usable])
        self._mean = np.array([np.mean(c[np.isfinite(c)]) if np.isfinite(c).any() else 0.0 for c in final.T])
        deviation = [np.std(c[np.isfinite(c)]) if np.isfinite(c).any() else 0.0 for c in final.T]
        self._scale = np.where(np.array(deviation) > 1e-12, deviation, 1.0)
        longest = max(o.fidelity for o in usable)
        early = [o for o in searcher.observations if o.status is Status.STOPPED and 0 < o.fidelity < longest]
        early = early[-_ROWS:]
        learnt = [*usable, *(o for o in early if np.isfinite(searcher.goal.losses(o.metrics)).all())]
        shares = [1.0] * len(usable) + [o.fidelity / longest for o in learnt[len(usable) :]]
        self.train = self.rows([o.config for o in learnt], shares)
        self.targets = self.scaled([o.metrics for o in learnt])
        self.targets = torch.nan_to_num(self.targets, nan=0.0)
        self.width = self.train.shape[1] - len(self.known)

    def rows(self, configs: Sequence[Mapping[str, Any]], shares: Sequence[float] | None = None) -> torch.Tensor:
        """Rows of configs, shape `(configs, width + known)`; `shares` of the full length, 1 unless told."""
        import torch

        features = self._searcher.space.features(self._searcher.space.encode(configs))
        length = np.ones(len(configs)) if shares is None else np.array(shares)
        positions = [self._searcher.goal.metrics.index(metric) for metric in self.known]
        costs = self._standardised([self._searcher.known_metrics(config) or {} for config in configs])[:, positions]
        inputs = self._scale_of_costs(self._searcher.known_values(configs))
        return torch.from_numpy(np.concatenate([features, length[:, None], inputs, costs], axis=1))

    def scaled(self, metrics: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """The goal's metrics, each standardised by the final results, shape `(results, metrics)`."""
        import torch

        return torch.from_numpy(self._standardised(metrics))

    def slack(self, constraint: Constraint) -> Callable[[torch.Tensor], torch.Tensor]:
        """Function from samples of the metrics to how far they break a constraint, negative where it holds."""
        column = self._searcher.goal.metrics.index(constraint.metric)
        bound = (constraint.bound - self._mean[column]) / self._scale[column]
        sign = 1.0 if constraint.op == "<=" else -1.0
        return lambda samples: sign * (samples[..., column] - bound)

    def process(self, column: int, rows: np.ndarray) -> SingleTaskGP:
        """A Gaussian process of one metric on some of the results, its hyperparameters at their start."""
        import torch
        from botorch.exceptions.warnings import InputDataWarning
        from botorch.models import SingleTaskGP
        from botorch.models.transforms.input import FilterFeatures

        features = FilterFeatures(torch.arange(self.width))
        targets = self.targets[rows, column : column + 1]
        with warnings.catch_warnings():
            # Early results lie below the final ones, by which all are standardised.
            warnings.simplefilter("ignore", InputDataWarning)
            return SingleTaskGP(self.train[rows], targets, outcome_transform=None, input_transform=features)

    def _standardised(self, metrics: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.asarray((self._metrics_of(metrics) - self._mean) / self._scale)

    def _metrics_of(self, metrics: Sequence[Mapping[str, Any]]) -> np.ndarray:
        names = self._searcher.goal.metrics
        rows = [[as_float(row.get(name)) for name in names] for row in metrics]
        return np.array(rows, dtype=float).reshape(len(rows), len(names))
