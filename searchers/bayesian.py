"""Bayesian optimisation over several objectives, with exact known costs.

Gaussian processes learn the metrics that only trials tell; those that the cost model knows enter
as deterministic functions. The next config maximises the log noisy expected hypervolume
improvement (Daulton et al. 2021, arXiv 2105.08195; Ament et al. 2023, arXiv 2310.20708) over a
pool of neighbours of the best results and of random configs, and then over neighbours of the most
promising of these, so that mixed spaces and costs without gradients need no relaxation. Results of
trials that were stopped early enter with their share of the full length as one more input
(Kandasamy et al. 2017, arXiv 1703.06240).
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
from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.known_costs import CostFunction
from ray_nascomp.searchers.operators import Variation
from ray_nascomp.searchers.process import Shape, design, process_variance
from ray_nascomp.searchers.process_shape import choose_shapes
from ray_nascomp.searchers.scaling import UnitScale
from ray_nascomp.searchers.warping import Warp

if TYPE_CHECKING:
    import torch
    from botorch.models import SingleTaskGP
    from botorch.models.model import Model
    from botorch.posteriors.torch import TorchPosterior

_POOL = 128
_RANDOM_SHARE = 0.25
_CLIMBS = 5
_CLIMBERS = 4
_NEIGHBOURS = 32
_BASELINE = 24
_CROSSOVER = 0.4
# A process costs the cube of its rows: a search of thousands of trials learns from the best and the newest.
_ROWS = 600
_SHAPED_BY = 128


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
        from botorch.utils.sampling import manual_seed
        from linear_operator.utils.warnings import NumericalWarning

        with manual_seed(int(self.rng.integers(2**31))), warnings.catch_warnings():
            # The jitter that results close to each other need.
            warnings.simplefilter("ignore", NumericalWarning)
            return self._most_promising(usable) or self.space.sample(self.rng)

    def _pool(self, usable: list[Observation]) -> list[dict[str, Any]]:
        """New, affordable configs: children of the best results, and random ones."""
        best = self.space.encode([o.config for o in self._best(usable, _BASELINE)])
        count = round((1 - _RANDOM_SHARE) * _POOL)
        first, second = self.rng.integers(len(best), size=(2, count))
        crossed = self.variation.crossover(self.rng, best[first], best[second])
        parents = np.where(self.rng.random((count, 1)) < _CROSSOVER, crossed, best[first])
        drafts = self.space.decode_many(self.variation.mutate(self.rng, parents))
        drafts += [self.space.sample(self.rng) for _ in range(_POOL - count)]
        return self._new(drafts)

    def _new(self, drafts: list[dict[str, Any]]) -> list[dict[str, Any]]:
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

    def _most_promising(self, usable: list[Observation]) -> dict[str, Any] | None:
        """The config of the largest acquisition value: of a pool, then of neighbours of the best so far."""
        acquisition = self._acquisition(usable)
        candidates = self._pool(usable)
        judged: list[tuple[float, dict[str, Any]]] = []
        for climb in range(_CLIMBS + 1):
            if candidates:
                judged += zip(acquisition(candidates).tolist(), candidates, strict=True)
                judged.sort(key=lambda pair: -pair[0])
            if judged and climb < _CLIMBS:
                best = self.space.encode([config for _, config in judged[:_CLIMBERS]])
                chosen = best[self.rng.integers(len(best), size=_NEIGHBOURS)]
                candidates = self._new(self.space.decode_many(self.variation.mutate(self.rng, chosen)))
        return judged[0][1] if judged else None

    def _acquisition(self, usable: list[Observation]) -> Callable[[Sequence[Mapping[str, Any]]], np.ndarray]:
        """Function from configs to their acquisition values."""
        import torch
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
        from botorch.models import ModelList
        from botorch.sampling.get_sampler import get_sampler

        results = _Results(self, self._worth_learning(usable))
        model = ModelList(*results.models())
        signs = torch.tensor([-o.sign for o in self.goal.objectives], dtype=torch.double)
        chosen = [self.goal.metrics.index(o.metric) for o in self.goal.objectives]
        feasible = [o for o in usable if self.goal.is_feasible(o.metrics)] or usable
        gains = results.scaled([o.metrics for o in feasible])[:, chosen] * signs
        low, high = gains.amin(dim=0), gains.amax(dim=0)
        baseline = results.rows([o.config for o in self._best(usable, _BASELINE)])
        samples = torch.Size([32 if len(chosen) < 3 else 16])
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model=model,
            ref_point=low - 0.1 * (high - low).clamp_min(1e-3),
            X_baseline=baseline,
            sampler=get_sampler(cast("TorchPosterior", model.posterior(baseline[:1])), sample_shape=samples, seed=0),
            objective=GenericMCMultiOutputObjective(lambda y, **_: results.unwarped(y)[..., chosen] * signs),
            constraints=[results.slack(constraint) for constraint in self.goal.constraints] or None,
            X_pending=results.rows(self.pending) if self.pending else None,
            prune_baseline=False,
            cache_root=False,
        )

        def values(configs: Sequence[Mapping[str, Any]]) -> np.ndarray:
            with torch.no_grad():
                gains = acquisition(results.rows(configs).unsqueeze(-2)).numpy()
            return np.asarray(np.nan_to_num(gains, nan=-np.inf))

        return values


def _column(position: int, rows: torch.Tensor) -> torch.Tensor:
    return rows[..., position : position + 1]


class _Results:
    """Configs and results as the models see them.

    A row holds the inputs (the encoded dimensions, unordered categoricals one-hot, the share of the full
    length, and all known metrics in the scale of the dimensions), what their trends are made of, and
    then the goal's known metrics, standardised.
    """

    def __init__(self, searcher: BayesianSearch, usable: list[Observation]) -> None:
        self._searcher = searcher
        self._known = [m for m in searcher.goal.metrics if m in (searcher.known_metrics(usable[0].config) or {})]
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
        self._inputs = self._inputs_of([o.config for o in learnt], shares)
        self._targets = np.nan_to_num(self._standardised([o.metrics for o in learnt]))
        self._warps: list[Warp | None] = [None] * len(searcher.goal.metrics)

    def models(self) -> list[Model]:
        """A model of each metric, deterministic where the cost model knows it; fixes how metrics are warped."""
        from botorch.models.deterministic import GenericDeterministicModel

        goal, width = self._searcher.goal, 3 * self._inputs.shape[1]
        unknown = [column for column, metric in enumerate(goal.metrics) if metric not in self._known]
        rows = np.linspace(0, len(self._inputs) - 1, min(_SHAPED_BY, len(self._inputs))).astype(int)
        shapes = iter(choose_shapes(self._inputs[rows], self._targets[rows][:, unknown]))
        models: list[Model] = []
        for column, metric in enumerate(goal.metrics):
            if column in unknown:
                models.append(self._process(column, next(shapes)))
            else:
                models.append(GenericDeterministicModel(partial(_column, width + self._known.index(metric))))
        return models

    def rows(self, configs: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Rows of configs trained in full, shape `(configs, width)`."""
        import torch

        inputs = self._inputs_of(configs, [1.0] * len(configs))
        positions = [self._searcher.goal.metrics.index(metric) for metric in self._known]
        costs = self._standardised([self._searcher.known_metrics(config) or {} for config in configs])[:, positions]
        return torch.from_numpy(np.concatenate([inputs, design(inputs), costs], axis=1))

    def scaled(self, metrics: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """The goal's metrics, each standardised by the final results, shape `(results, metrics)`."""
        import torch

        return torch.from_numpy(self._standardised(metrics))

    def unwarped(self, samples: torch.Tensor) -> torch.Tensor:
        """Standardised metrics of what the models say, shape `(..., metrics)`."""
        import torch

        columns = [
            samples[..., column] if warp is None else torch.from_numpy(warp.inverse(samples[..., column].numpy()))
            for column, warp in enumerate(self._warps)
        ]
        return torch.stack(columns, dim=-1)

    def slack(self, constraint: Constraint) -> Callable[[torch.Tensor], torch.Tensor]:
        """Function from samples of the models to how far they break a constraint, negative where it holds."""
        column = self._searcher.goal.metrics.index(constraint.metric)
        bound = (constraint.bound - self._mean[column]) / self._scale[column]
        sign = 1.0 if constraint.op == "<=" else -1.0
        return lambda samples: sign * (self.unwarped(samples)[..., column] - bound)

    def _process(self, column: int, shape: Shape) -> SingleTaskGP:
        """The Gaussian process of a metric on all results, its hyperparameters given."""
        import torch
        from botorch.exceptions.warnings import InputDataWarning
        from botorch.models import SingleTaskGP
        from gpytorch.constraints import Positive
        from gpytorch.kernels import LinearKernel, MaternKernel, ScaleKernel
        from gpytorch.likelihoods import GaussianLikelihood
        from gpytorch.means import ZeroMean

        width = self._inputs.shape[1]
        warp = self._warps[column] = Warp(self._targets[:, column], shape.strength)
        warped = warp(self._targets[:, column])
        variance = process_variance(self._inputs, warped, shape)
        matern = MaternKernel(nu=1.5, ard_num_dims=width, active_dims=tuple(range(width)))
        trend = LinearKernel(ard_num_dims=2 * width, active_dims=tuple(range(width, 3 * width)))
        kernel, likelihood = ScaleKernel(matern + trend), GaussianLikelihood(noise_constraint=Positive())
        unread = np.zeros((len(warped), len(self._known)))
        rows = torch.from_numpy(np.concatenate([self._inputs, design(self._inputs), unread], axis=1))
        with warnings.catch_warnings():
            # Early results lie below the final ones, by which all are standardised.
            warnings.simplefilter("ignore", InputDataWarning)
            model = SingleTaskGP(
                rows,
                torch.from_numpy(warped)[:, None],
                likelihood=likelihood,
                covar_module=kernel,
                mean_module=ZeroMean(),
                outcome_transform=None,
            )
        matern.lengthscale = torch.from_numpy(shape.lengths)
        trend.variance = torch.from_numpy(np.tile(shape.trends, 2))
        kernel.outputscale, likelihood.noise = variance, shape.noise * variance
        model.eval()
        return model

    def _inputs_of(self, configs: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> np.ndarray:
        features = self._searcher.space.features(self._searcher.space.encode(configs))
        costs = self._scale_of_costs(self._searcher.known_values(configs))
        return np.concatenate([features, np.array(shares)[:, None], costs], axis=1)

    def _standardised(self, metrics: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.asarray((self._metrics_of(metrics) - self._mean) / self._scale)

    def _metrics_of(self, metrics: Sequence[Mapping[str, Any]]) -> np.ndarray:
        names = self._searcher.goal.metrics
        rows = [[as_float(row.get(name)) for name in names] for row in metrics]
        return np.array(rows, dtype=float).reshape(len(rows), len(names))
