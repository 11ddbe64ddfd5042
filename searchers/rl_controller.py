"""Reinforcement learning: a controller that writes configs, rewarded for those that turn out well.

As in MnasNet (Tan et al. 2019, arXiv 1807.11626) an autoregressive controller is trained by
proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347). Random weights of the
objectives are its input, so that one controller covers the front; a trial teaches it for all
weights. Between trials it learns from configs of its own whose known costs are exact and whose
other metrics are predicted, as DyNA-PPO does (Angermueller et al. 2020). Configs that break a
constraint on a known cost are never tried, as actions are bounded in AMC (He et al. 2018, arXiv
1802.03494).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_nascomp.goals import Goal
from ray_nascomp.observations import Observation
from ray_nascomp.searchers.base import GoalSearcher
from ray_nascomp.searchers.choices import Choices
from ray_nascomp.searchers.controller import Controller
from ray_nascomp.searchers.known_costs import CostFunction
from ray_nascomp.searchers.lessons import Imagination, Memory
from ray_nascomp.searchers.reward import Reward

_DRAWS = 8
_HEAT = 1.5
_HOTTEST = 40.0
_FIRST_LESSON = 8
_LESSON_EVERY = 4
_ROUNDS = 3
_EPOCHS = 4
_PREFERENCES = 8
# What is older was chosen by a controller that knew little, and counts for little.
_WINDOW = 128
_BEHAVIOUR_SAMPLES = 16
# Below 1: the ends of the front are asked for as often as its middle.
_CONCENTRATION = 0.5


class RLControllerSearch(GoalSearcher):
    """Policy search with an autoregressive controller.

    Args:
        goal: See `GoalSearcher`.
        cost_model: See `GoalSearcher`. It is asked about hundreds of configs each time the controller learns.
        imagination: Whether the controller also learns from predictions, not from trials alone.
        seed: See `GoalSearcher`.
        points_to_evaluate: See `GoalSearcher`.
        warm_start: See `GoalSearcher`.

    Raises:
        ConfigError: If an argument is not allowed.
    """

    def __init__(
        self,
        goal: Goal,
        cost_model: CostFunction | None = None,
        *,
        imagination: bool = True,
        seed: int | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        warm_start: Iterable[Observation] | str | Path | Any = None,
    ) -> None:
        super().__init__(goal, cost_model, seed=seed, points_to_evaluate=points_to_evaluate, warm_start=warm_start)
        self._imagination = imagination
        self._policy: tuple[Choices, Controller] | None = None
        self._saved: dict[str, Any] | None = None
        self._drawn: dict[str, float] = {}
        self._behaviour: dict[str, float] = {}
        self._taught = 0

    @property
    def policy(self) -> tuple[Choices, Controller]:
        """The space as choices, and the controller that makes them."""
        if self._policy is None:
            choices = Choices(self.space)
            # Of a restored search the weights are known, and its generator has given what it had to.
            rng = self.rng if self._saved is None else np.random.default_rng(0)
            controller = Controller(choices, len(self.goal.objectives), rng)
            if self._saved is not None:
                controller.load(self._saved)
            self._policy, self._saved = (choices, controller), None
        return self._policy

    def propose(self) -> dict[str, Any]:
        """What the controller writes for random weights; where all is known or unaffordable, more daringly."""
        opening = self.opening()
        if opening is not None:
            return opening
        choices, controller = self.policy
        heat = 1.0
        while True:
            options, _ = controller.draw(self.rng, self._preferences(_DRAWS), heat)
            configs = self.space.decode_many(choices.encoded(self.rng, options))
            self.foresee(configs)
            for config in configs:
                if self.is_new(config) and self.known_metrics(config) is not None:
                    self._drawn[self.key(config)] = self._log_probability(config)
                    return config
            heat *= _HEAT
            if heat > _HOTTEST:
                return configs[0]

    def observed(self, observation: Observation, reports: Mapping[int, Mapping[str, Any]]) -> None:
        """Every few results the controller learns."""
        drawn = self._drawn.pop(self.key(observation.config), None)
        # What another has suggested counts as if the controller had, now.
        self._behaviour[observation.trial_id] = self._log_probability(observation.config) if drawn is None else drawn
        while len(self._behaviour) > _WINDOW:
            del self._behaviour[next(iter(self._behaviour))]
        finals, count = self.final_positions(), len(self.observations)
        if len(finals) >= _FIRST_LESSON and count - self._taught >= max(_LESSON_EVERY, count // 50):
            self._taught = count
            self._learn(finals)

    def own_state(self) -> dict[str, Any]:
        """The controller, when it last learnt, and how likely its choices were."""
        controller = self._policy[1].to_dict() if self._policy is not None else self._saved
        return {
            "controller": controller,
            "taught": self._taught,
            "drawn": self._drawn,
            "behaviour": self._behaviour,
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self._policy, self._saved = None, state["controller"]
        self._taught, self._drawn, self._behaviour = state["taught"], state["drawn"], state["behaviour"]

    def _preferences(self, count: int) -> np.ndarray:
        return self.rng.dirichlet(np.full(len(self.goal.objectives), _CONCENTRATION), size=count)

    def _log_probability(self, config: Mapping[str, Any]) -> float:
        """Logarithm of the chance of a config, whatever the weights."""
        choices, controller = self.policy
        options = np.repeat(choices.options(self.space.encode([config])), _BEHAVIOUR_SAMPLES, axis=0)
        active = np.repeat(choices.active([config]), _BEHAVIOUR_SAMPLES, axis=0)
        logs = controller.log_probability(options, active, self._preferences(_BEHAVIOUR_SAMPLES))
        return float(np.logaddexp.reduce(logs) - np.log(_BEHAVIOUR_SAMPLES))

    def _learn(self, finals: list[int]) -> None:
        _, losses, violations = self.table(finals)
        finite = np.isfinite(losses).all(axis=1)
        feasible = finite & (violations == 0)
        if not finite.any():
            return
        reward = Reward(losses[feasible if feasible.any() else finite])
        choices, controller = self.policy
        memory = Memory(self, choices, reward, self._behaviour)
        imagination = Imagination(self, reward) if self._imagination else None
        for _ in range(_ROUNDS):
            preferences = self._preferences(_PREFERENCES)
            lessons = [memory.experience(self.rng, preferences)]
            if imagination is not None:
                lessons.append(imagination.experience(self.rng, choices, controller, preferences))
            controller.learn(lessons, _EPOCHS)
