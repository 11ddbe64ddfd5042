"""What the controller learns from: trials that it remembers, and configs whose results it imagines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.choices import Choices
from ray_nascomp.searchers.controller import Controller, Experience
from ray_nascomp.searchers.process import ProcessSurrogate
from ray_nascomp.searchers.process_shape import choose_shapes
from ray_nascomp.searchers.reward import Reward, advantages

_REPLAYED = 24
_BASELINE_DECAY = 0.98
_IMAGINED = 16
_LEARNT = 200
_COST_SCALE = 0.25


class Memory:
    """The latest trials, as they look for any weights of the objectives.

    A trial that was stopped early may look worse than it is, never better: it can only discourage.

    Args:
        searcher: Whose trials they are.
        choices: The space as choices.
        reward: What results are worth.
        behaviour: Trial -> logarithm of the chance with which its config was chosen, oldest first.
    """

    def __init__(
        self, searcher: GoalSearcher, choices: Choices, reward: Reward, behaviour: Mapping[str, float]
    ) -> None:
        observations = searcher.observations
        first = max(0, len(observations) - len(behaviour))
        positions = [i for i in range(first, len(observations)) if observations[i].trial_id in behaviour]
        encoded, losses, self._violations = searcher.table(positions)
        self._options = choices.options(encoded)
        self._active = choices.active([observations[i].config for i in positions])
        self._scaled = reward.scaled(losses)
        self._reward = reward
        self._behaviour = np.array([behaviour[observations[i].trial_id] for i in positions])
        is_usable = (self._violations == 0) & np.isfinite(losses).all(axis=1)
        self._only_discourages = is_usable & ~np.isin(positions, searcher.final_positions())
        # The baseline moves: older trials were chosen by a controller that knew less.
        self._weights = _BASELINE_DECAY ** np.arange(len(positions))[::-1]

    def experience(self, rng: np.random.Generator, preferences: np.ndarray) -> Experience:
        """Some random trials for each row of weights, shape `(preferences, objectives)`."""
        rewards = self._reward(self._scaled, self._violations, preferences)
        better = advantages(rewards, self._weights)
        better = np.where(self._only_discourages, np.minimum(better, 0), better)
        count = min(_REPLAYED, len(self._weights))
        chosen = np.concatenate([rng.permutation(len(self._weights))[:count] for _ in preferences])
        whose = np.repeat(np.arange(len(preferences)), count)
        return Experience(
            self._options[chosen],
            self._active[chosen],
            preferences[whose],
            better[whose, chosen],
            self._behaviour[chosen],
        )


class Imagination:
    """Configs of the controller with their exact known costs and predictions of the rest.

    Args:
        searcher: Whose trials the predictions are learnt from.
        reward: What results are worth.
    """

    def __init__(self, searcher: GoalSearcher, reward: Reward) -> None:
        self._searcher, self._reward = searcher, reward
        goal, finals = searcher.goal, searcher.final_positions()[-_LEARNT:]
        known = searcher.known_metrics(searcher.observations[finals[0]].config) or {}
        self._known_objectives = [i for i, objective in enumerate(goal.objectives) if objective.metric in known]
        self._objectives = [i for i in range(len(goal.objectives)) if i not in self._known_objectives]
        self._constraints = [constraint for constraint in goal.constraints if constraint.metric not in known]
        encoded, losses, _ = searcher.table(finals)
        # Objectives are predicted on the reward's scale, on which outliers are none.
        bounded = searcher.metric_table(finals)[:, [goal.metrics.index(c.metric) for c in self._constraints]]
        targets = np.concatenate([reward.scaled(losses)[:, self._objectives], bounded], axis=1)
        usable = np.flatnonzero(np.isfinite(targets).all(axis=1))
        self._learnt = [searcher.observations[finals[row]].config for row in usable]
        self._encoded = encoded[usable]
        inputs = self._inputs([])
        self._surrogate = ProcessSurrogate(inputs, targets[usable], choose_shapes(inputs, targets[usable]))

    def experience(
        self, rng: np.random.Generator, choices: Choices, controller: Controller, preferences: np.ndarray
    ) -> Experience:
        """Some configs of the controller for each row of weights, shape `(preferences, objectives)`."""
        wanted = np.repeat(preferences, _IMAGINED, axis=0)
        drawn, _ = controller.draw(rng, wanted)
        configs = self._searcher.space.decode_many(choices.encoded(rng, drawn))
        self._searcher.foresee(configs)
        options, active = choices.options(self._searcher.space.encode(configs)), choices.active(configs)
        scaled, violations = self._results(rng, configs)
        rewards = self._reward(scaled, violations, preferences)
        own = rewards.reshape(len(preferences), len(preferences), _IMAGINED)
        better = advantages(own[np.arange(len(preferences)), np.arange(len(preferences))]).reshape(-1)
        behaviour = controller.log_probability(options, active, wanted)
        return Experience(options, active, wanted, better, behaviour)

    def _results(self, rng: np.random.Generator, configs: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Scaled losses `(n, objectives)` and violations `(n,)`, one sample of each prediction."""
        objectives = self._searcher.goal.objectives
        predicted = self._surrogate.sample(rng, self._inputs(configs)[len(self._learnt) :], 1)[0]
        known = [self._searcher.known_metrics(config) for config in configs]
        losses = np.full((len(configs), len(objectives)), np.nan)
        for column in self._known_objectives:
            metric, sign = objectives[column].metric, objectives[column].sign
            losses[:, column] = [sign * row[metric] if row is not None else np.nan for row in known]
        scaled = self._reward.scaled(losses)
        scaled[:, self._objectives] = predicted[:, : len(self._objectives)]
        violations = np.array([np.inf if row is None else 0.0 for row in known])
        for constraint, values in zip(self._constraints, predicted[:, len(self._objectives) :].T, strict=True):
            violations += [constraint.violation(value) for value in values.tolist()]
        return scaled, violations

    def _inputs(self, configs: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Features of the configs learnt from and of others."""
        space = self._searcher.space
        features = space.features(np.concatenate([self._encoded, space.encode(configs)]))
        costs = self._searcher.known_features([*self._learnt, *configs], scaled_by=len(self._learnt))
        return np.concatenate([features, 0.5 + _COST_SCALE * costs], axis=1)
