from __future__ import annotations

import json

import numpy as np
import pytest
from ray import tune

import ray_nascomp as nc
from ray_nascomp.searchers import GoalSearcher, RLControllerSearch
from ray_nascomp.searchers.choices import Choices
from ray_nascomp.searchers.controller import Controller, Experience
from ray_nascomp.searchers.reward import Reward, advantages
from ray_nascomp.space import Space
from ray_nascomp.testing.problems import mixed
from ray_nascomp.testing.searchers import SearcherConformance, run_search

NESTED = {
    "leaf": nc.when(tune.choice(["x", "y", "z"]), "root", [2, 3]),
    "root": tune.randint(0, 4),
    "rate": tune.loguniform(1e-4, 1e-1),
    "kept": tune.quniform(0, 0.9, 0.05),
}


class TestRLControllerSearch(SearcherConformance):
    def make(self, goal, cost_model=None, **options):
        return RLControllerSearch(goal, cost_model, **options)


class RandomSearch(GoalSearcher):
    def propose(self):
        return self.space.sample(self.rng)


class Untaught(RLControllerSearch):
    """Its controller's output stays what it is at the start: all options alike."""

    def _learn(self, finals):
        pass


def volumes(make, problem, trials, seeds, known=None):
    return [
        problem.hypervolume([m for _, m in run_search(make(problem.goal, known, seed=s), problem, trials)])
        for s in range(seeds)
    ]


@pytest.mark.slow
def test_what_the_controller_learns_is_what_finds_hypervolume():
    problem = mixed()
    taught = volumes(RLControllerSearch, problem, 100, 6, problem.known)
    untaught = volumes(Untaught, problem, 100, 6, problem.known)
    spread = np.sqrt((np.var(taught, ddof=1) + np.var(untaught, ddof=1)) / 6)
    assert np.mean(taught) - np.mean(untaught) > 3 * spread


def test_an_untaught_controller_draws_all_options_alike_and_knows_it():
    choices = Choices(Space(NESTED))
    controller = Controller(choices, 2, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    options, active = controller.draw(rng, rng.dirichlet([1, 1], size=4000))
    names = [list(NESTED)[position] for position in choices.order]
    assert names.index("root") < names.index("leaf")
    root, leaf = names.index("root"), names.index("leaf")
    assert np.bincount(options[:, root]) / 4000 == pytest.approx(np.full(4, 0.25), abs=0.03)
    np.testing.assert_array_equal(active[:, leaf], options[:, root] >= 2)
    logs = controller.log_probability(options, active, rng.dirichlet([1, 1], size=4000))
    expected = np.log(4) + np.log(12) + np.log(19) + active[:, leaf] * np.log(3)
    assert logs == pytest.approx(-expected, abs=1e-4)


def test_options_and_configs_go_into_each_other():
    space = Space(NESTED)
    choices = Choices(space)
    rng = np.random.default_rng(0)
    options, active = Controller(choices, 1, rng).draw(rng, np.ones((200, 1)))
    configs = space.decode_many(choices.encoded(rng, options))
    np.testing.assert_array_equal(choices.active(configs), active)
    back = choices.options(space.encode(configs))
    np.testing.assert_array_equal(back[active], options[active])
    assert len({config["rate"] for config in configs}) == 200


def test_drawn_frequencies_are_the_probabilities_that_are_told():
    space = Space({"a": tune.choice(["p", "q", "r"]), "b": tune.choice(["s", "t"])})
    choices = Choices(space)
    rng = np.random.default_rng(0)
    controller = Controller(choices, 2, rng)
    for value in controller.weights.values():
        value += rng.normal(scale=0.7, size=value.shape).astype(np.float32)
    wanted = np.repeat([[0.3, 0.7]], 20_000, axis=0)
    options, _ = controller.draw(rng, wanted)
    every = np.array([[a, b] for a in range(3) for b in range(2)])
    told = np.exp(controller.log_probability(every, np.ones_like(every, dtype=bool), wanted[:6]))
    seen = np.bincount(options[:, 0] * 2 + options[:, 1], minlength=6) / 20_000
    assert told.sum() == pytest.approx(1, abs=1e-5)
    assert seen == pytest.approx(told, abs=0.012)
    assert np.ptp(told) > 0.1


def test_it_learns_what_depends_on_the_weights_and_on_earlier_choices():
    space = Space({"a": tune.choice(["p", "q", "r"]), "b": tune.choice(["p", "q", "r"])})
    rng = np.random.default_rng(0)
    choices = Choices(space)
    controller = Controller(choices, 2, rng)
    for _ in range(150):
        wanted = np.repeat(rng.dirichlet([0.5, 0.5], size=8), 16, axis=0)
        options, active = controller.draw(rng, wanted)
        # The first weight asks for "p"; the second dimension has to agree with the first.
        rewards = (options[:, 0] == np.where(wanted[:, 0] > 0.5, 0, 2)) + 1.0 * (options[:, 0] == options[:, 1])
        better = advantages(rewards.reshape(8, 16)).reshape(-1)
        logs = controller.log_probability(options, active, wanted)
        controller.learn([Experience(options, active, wanted, better, logs)], 3)
    for weights, first in (([0.95, 0.05], 0), ([0.05, 0.95], 2)):
        options, _ = controller.draw(rng, np.repeat([weights], 500, axis=0))
        assert np.mean(options[:, 0] == first) > 0.7
        assert np.mean(options[:, 1] == options[:, 0]) > 0.7


def test_a_choice_that_is_no_longer_likely_teaches_less():
    space = Space({"a": tune.choice(["p", "q"])})
    moved = []
    for behaviour in (np.log(0.5), 0.0):
        controller = Controller(Choices(space), 1, np.random.default_rng(0))
        chosen, ones = np.zeros((4, 1), dtype=int), np.ones((4, 1))
        noise = np.array([1.0, 1.0, -1.0, -1.0])
        rows = Experience(chosen, ones.astype(bool), ones, np.abs(noise), np.full(4, behaviour))
        controller.learn(
            [rows, Experience(1 - chosen, ones.astype(bool), ones, noise * 0 + 0.9, np.full(4, np.log(0.5)))], 1
        )
        moved.append(controller.log_probability(chosen[:1], ones[:1].astype(bool), ones[:1])[0])
    assert moved[0] > np.log(0.5) > moved[1]


def test_any_infeasible_result_is_worth_less_than_any_feasible_one():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(50, 3))
    reward = Reward(losses)
    scaled = reward.scaled(np.vstack([losses, losses.max(axis=0) + 100]))
    assert scaled[:50].min() >= 0
    assert scaled[:50].max() <= 1
    preferences = rng.dirichlet(np.ones(3), size=20)
    feasible = reward(scaled, np.zeros(51), preferences)
    broken = reward(scaled, np.linspace(0.01, 2, 51), preferences)
    assert broken.max() < feasible.min()
    assert (np.diff(broken, axis=1) <= 0).all()
    nan = reward(np.full((1, 3), np.nan), np.zeros(1), preferences)
    assert (nan <= feasible.min(axis=1, keepdims=True)).all()


def test_a_larger_weight_asks_for_a_smaller_loss():
    reward = Reward(np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]))
    scaled = reward.scaled(np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]))
    best = reward(scaled, np.zeros(3), np.array([[0.99, 0.01], [0.5, 0.5], [0.01, 0.99]])).argmax(axis=1)
    assert best.tolist() == [0, 1, 2]


def test_an_objective_negated_or_rescaled_is_the_same_search():
    problem = mixed()
    goal = nc.Goal([nc.Objective("error", "min"), nc.Objective("size", "min")])

    def renamed(config):
        metrics = problem.evaluate(config)
        return {"error": -256 * metrics["accuracy"], "size": metrics["size"]}

    other = type(problem)("other", goal, problem.space, renamed, problem.known, (0.0, 0.0), (1.0, 1.0))
    one, two = (run_search(RLControllerSearch(p.goal, p.known, seed=0), p, 30) for p in (problem, other))
    assert [config for config, _ in one] == [config for config, _ in two]


def test_state_is_small_plain_text():
    problem = mixed()
    searcher = RLControllerSearch(problem.goal, problem.known, seed=0)
    run_search(searcher, problem, 20)
    assert len(json.dumps(searcher.own_state())) < 150_000
    assert searcher.own_state()["controller"]["steps"] > 0


def test_results_of_others_are_learnt_from():
    problem = mixed()
    earlier = RandomSearch(problem.goal, seed=0)
    run_search(earlier, problem, 60)
    searcher = RLControllerSearch(problem.goal, problem.known, seed=0, warm_start=earlier)
    searcher.set_search_properties(None, None, dict(problem.space))
    assert searcher.own_state()["controller"]["steps"] > 0
    assert len(run_search(searcher, problem, 4)) == 4
