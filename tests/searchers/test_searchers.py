from __future__ import annotations

import json

import cloudpickle
import numpy as np
import pytest
from ray import tune
from ray.tune.search import Searcher

import ray_nascomp as nc
from ray_nascomp.errors import ConfigError, InfeasibleError
from ray_nascomp.observations import Status
from ray_nascomp.pareto import normalised_hypervolume
from ray_nascomp.searchers import BayesianSearch, EvolutionarySearch, GoalSearcher, HybridSearch
from ray_nascomp.space import Space

GROUPS = 10
SPACE = {
    "prune": {"sparsity": {f"layer{i}": nc.sparsity() for i in range(GROUPS)}, "method": tune.choice(["a", "b", "c"])},
    "quantize": {"bits": {f"layer{i}": nc.bits([4, 8, 32]) for i in range(4)}},
    "finetune": {"lr": tune.loguniform(1e-4, 1e-1)},
    "constant": 7,
}
GOAL = nc.Goal([nc.Objective("accuracy"), nc.Objective("size", "min")])
_rng = np.random.default_rng(1)
SENSITIVITY, SIZE = _rng.uniform(0.2, 3, GROUPS), _rng.uniform(0.2, 3, GROUPS)


def parts(config):
    sparsity = np.array(list(config["prune"]["sparsity"].values()))
    bits = np.array([*config["quantize"]["bits"].values(), *[32] * (GROUPS - 4)])
    return sparsity, bits


def size_of(config):
    sparsity, bits = parts(config)
    return {"size": float((SIZE * (1 - sparsity) * bits / 32).sum() / SIZE.sum())}


def evaluate(config):
    sparsity, bits = parts(config)
    damage = (SENSITIVITY * (sparsity**3 + 0.15 * (bits == 4))).sum() / SENSITIVITY.sum()
    damage += 0.02 * (np.log10(config["finetune"]["lr"]) + 2.5) ** 2
    damage += {"a": 0, "b": 0.02, "c": 0.04}[config["prune"]["method"]]
    return {"accuracy": float(np.exp(-2 * damage)), **size_of(config)}


class RandomSearch(GoalSearcher):
    def propose(self):
        return self.space.sample(self.rng)


def search(searcher, trials, function=evaluate, space=SPACE):
    if searcher._space is None:
        searcher.set_search_properties(None, None, space)
    results = []
    for number in range(trials):
        trial_id = f"t{len(searcher.observations)}_{number}"
        config = searcher.suggest(trial_id)
        metrics = function(config)
        searcher.on_trial_complete(trial_id, {**metrics, "training_iteration": 1, "done": True})
        results.append((config, metrics))
    return results


def volume(results):
    losses = np.array([GOAL.losses(metrics) for _, metrics in results])
    return normalised_hypervolume(losses, np.array([-1.0, 0.0]), np.array([0.0, 1.0]))


def test_evolution_finds_more_hypervolume_than_random_and_costs_help():
    seeds = range(10)
    random = [volume(search(RandomSearch(GOAL, seed=s), 80)) for s in seeds]
    blind = [volume(search(EvolutionarySearch(GOAL, seed=s), 80)) for s in seeds]
    costed = [volume(search(EvolutionarySearch(GOAL, size_of, seed=s), 80)) for s in seeds]
    assert np.mean(blind) > max(random)
    assert np.mean(costed) > np.mean(blind)
    assert min(costed) > max(random)


def test_screening_and_roles_pay():
    seeds = range(8)
    full = np.mean([volume(search(EvolutionarySearch(GOAL, size_of, seed=s), 80)) for s in seeds])
    unscreened = [volume(search(EvolutionarySearch(GOAL, size_of, seed=s, screening=False), 80)) for s in seeds]
    assert full > np.mean(unscreened) + 0.02


def test_late_moves_try_other_bits_of_what_was_trained():
    def shares(late_moves):
        searcher = EvolutionarySearch(GOAL, size_of, seed=0, late_moves=late_moves)
        search(searcher, 80)
        seen, met = set(), []
        for observation in searcher.observations:
            rest = json.dumps({key: value for key, value in observation.config.items() if key != "quantize"})
            met.append(rest in seen)
            seen.add(rest)
        return np.mean(met[12:])

    assert shares(0.75) == pytest.approx(0.75, abs=0.15)
    assert shares(0.0) < 0.2


@pytest.mark.slow
def test_bayesian_search_needs_a_quarter_of_the_trials_of_evolution_without_a_model():
    seeds = range(3)
    evolved = [volume(search(EvolutionarySearch(GOAL, size_of, seed=s, screening=False), 160)) for s in seeds]
    modelled = [volume(search(BayesianSearch(GOAL, size_of, seed=s), 40)) for s in seeds]
    assert np.mean(modelled) > np.mean(evolved) + 0.01


@pytest.mark.slow
def test_bayesian_search_keeps_to_a_constraint_that_only_trials_tell():
    goal = nc.Goal(GOAL.objectives, [nc.Constraint("accuracy", ">=", 0.8)])
    random = search(RandomSearch(goal, size_of, seed=0), 200)
    found = search(BayesianSearch(goal, size_of, seed=0), 40)[10:]
    chance = np.mean([metrics["accuracy"] >= 0.8 for _, metrics in random])
    assert np.mean([metrics["accuracy"] >= 0.8 for _, metrics in found]) > max(0.3, 3 * chance)


def test_bayesian_search_learns_from_trials_that_were_stopped_early():
    searcher = BayesianSearch(GOAL, size_of, seed=0)
    searcher.set_search_properties(None, None, SPACE)
    for number in range(30):
        config = searcher.suggest(str(number))
        stopped = number % 3 != 0
        metrics = evaluate(config)
        metrics["accuracy"] *= 0.5 if stopped else 1.0
        result = {**metrics, "training_iteration": 3 if stopped else 9, "final": not stopped}
        searcher.on_trial_complete(str(number), result)
    finals = searcher.final_observations()
    assert len(finals) == 10
    config = searcher.suggest("next")
    assert searcher.known_metrics(config) is not None


def test_a_portfolio_gives_most_trials_to_the_member_that_pays():
    asked = {"evolution": 0, "first corner": 0}

    class Counted(EvolutionarySearch):
        def propose(self):
            asked["evolution"] += 1
            return super().propose()

    class Corner(GoalSearcher):
        """Stays where nothing is to be gained: everything pruned as far as it goes."""

        def propose(self):
            asked["first corner"] += 1
            config = self.space.sample(self.rng)
            config["prune"]["sparsity"] = dict.fromkeys(config["prune"]["sparsity"], 0.9)
            return config

    results = [volume(search(HybridSearch(GOAL, size_of, members=[Counted, Corner], seed=s), 60)) for s in range(5)]
    assert asked["evolution"] > 1.3 * asked["first corner"]
    assert np.mean(results) > np.mean([volume(search(RandomSearch(GOAL, seed=s), 60)) for s in range(5)]) + 0.03


def test_a_known_constraint_is_never_broken():
    goal = nc.Goal(GOAL.objectives, [nc.Constraint("size", "<=", 0.3)])
    results = search(EvolutionarySearch(goal, size_of, seed=0), 60)
    assert all(metrics["size"] <= 0.3 for _, metrics in results)


def test_infeasible_configs_are_not_suggested():
    def refuses(config):
        if config["prune"]["sparsity"]["layer0"] > 0.5:
            raise InfeasibleError("too thin")
        return size_of(config)

    results = search(EvolutionarySearch(GOAL, refuses, seed=0), 40)
    assert all(config["prune"]["sparsity"]["layer0"] <= 0.5 for config, _ in results)


@pytest.mark.parametrize("make", [RandomSearch, EvolutionarySearch])
def test_every_suggestion_is_whole_valid_and_new(make):
    searcher = make(GOAL, size_of, seed=3)
    results = search(searcher, 60)
    space = Space(SPACE)
    for config, _ in results:
        assert config["constant"] == 7
        assert space.canonical(config) == config
        json.dumps(config)
    assert len({space.key(config) for config, _ in results}) == 60


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aging": True},
        {"screening": False},
        {"cost_model": size_of},
        {"late_moves": 0.5},
        {"screening": False, "late_moves": 0.5},
    ],
)
def test_a_restored_search_goes_on_as_if_never_stopped(options, tmp_path):
    whole = [config for config, _ in search(EvolutionarySearch(GOAL, seed=5, **options), 40)]
    first = EvolutionarySearch(GOAL, seed=5, **options)
    head = [config for config, _ in search(first, 25)]
    first.save(str(tmp_path / "state"))
    second = EvolutionarySearch(GOAL, seed=99, **options)
    second.restore(str(tmp_path / "state"))  # The space comes with the state, as after Tuner.restore.
    tail = [config for config, _ in search(second, 15)]
    assert head + tail == whole


def test_pending_trials_survive_a_restore_and_are_not_suggested_again(tmp_path):
    searcher = EvolutionarySearch(GOAL, seed=0)
    searcher.set_search_properties(None, None, SPACE)
    pending = searcher.suggest("running")
    searcher.save(str(tmp_path / "state"))
    other = EvolutionarySearch(GOAL)
    other.restore(str(tmp_path / "state"))
    assert not other.is_new(pending)
    other.on_trial_complete("running", {**evaluate(pending), "training_iteration": 1})
    assert other.observations[0].config == pending


def test_many_pending_trials_cost_little():
    def parallel(seed):
        searcher = EvolutionarySearch(GOAL, size_of, seed=seed)
        searcher.set_search_properties(None, None, SPACE)
        running, results = [], []
        for number in range(88):
            if len(running) == 8 or number >= 80:
                trial_id, config = running.pop(0)
                metrics = evaluate(config)
                searcher.on_trial_complete(trial_id, {**metrics, "training_iteration": 1})
                results.append((config, metrics))
            if number < 80:
                running.append((str(number), searcher.suggest(str(number))))
        return volume(results)

    sequential = np.mean([volume(search(EvolutionarySearch(GOAL, size_of, seed=s), 80)) for s in range(6)])
    assert np.mean([parallel(s) for s in range(6)]) > 0.93 * sequential


def test_ends_of_trials_are_told_apart():
    searcher = EvolutionarySearch(GOAL, seed=0)
    searcher.set_search_properties(None, None, SPACE)
    good = {"accuracy": 0.5, "size": 0.5}
    ends = {
        "completed": {**good, "training_iteration": 9, "final": True},
        "stopped": {**good, "training_iteration": 3, "final": False},
        "infeasible": {**good, "training_iteration": 1, "final": True, "feasible": False},
    }
    for name, result in ends.items():
        searcher.suggest(name)
        searcher.on_trial_complete(name, result)
    for name in ("failed", "paused", "silent"):
        searcher.suggest(name)
    searcher.on_trial_result("paused", {**good, "training_iteration": 2})
    searcher.on_trial_complete("failed", None, error=True)
    searcher.on_trial_complete("paused", None)
    searcher.on_trial_complete("silent", None)
    found = {o.trial_id: (o.status, o.fidelity) for o in searcher.observations}
    assert found == {
        "completed": (Status.COMPLETED, 9),
        "stopped": (Status.STOPPED, 3),
        "infeasible": (Status.INFEASIBLE, 1),
        "failed": (Status.FAILED, 0),
        "paused": (Status.STOPPED, 2),
        "silent": (Status.FAILED, 0),
    }
    assert [o.trial_id for o in searcher.final_observations()] == ["completed"]


def test_a_trainable_that_does_not_mark_its_end_is_final_at_its_longest():
    searcher = EvolutionarySearch(GOAL, seed=0)
    searcher.set_search_properties(None, None, SPACE)
    for name, iteration in (("short", 3), ("long", 9)):
        searcher.suggest(name)
        searcher.on_trial_complete(name, {"accuracy": 0.5, "size": 0.5, "training_iteration": iteration, "done": True})
    assert [o.trial_id for o in searcher.final_observations()] == ["long"]


def test_broken_results_do_not_stop_the_search():
    def broken(config):
        return [
            {"accuracy": float("nan"), "size": 0.1},
            {"size": 0.1},
            {"accuracy": "high", "size": 1},
            evaluate(config),
        ][int(100 * config["prune"]["sparsity"]["layer0"]) % 4]

    assert len(search(EvolutionarySearch(GOAL, size_of, seed=0), 60, broken)) == 60


def test_a_finite_space_is_searched_once_and_then_finished():
    searcher = EvolutionarySearch(GOAL, seed=0)
    space = {"a": tune.choice([1, 2, 3]), "b": nc.when(tune.choice([1, 2]), "a", [3])}
    searcher.set_search_properties(None, None, space)
    found = []
    while (config := searcher.suggest(str(len(found)))) != Searcher.FINISHED:
        found.append(config)
        searcher.on_trial_complete(str(len(found) - 1), {"accuracy": 1.0, "size": 1.0, "training_iteration": 1})
    assert sorted((c["a"], c["b"]) for c in found) == [(1, 1), (2, 1), (3, 1), (3, 2)]


def test_points_come_first_and_earlier_results_are_learnt_from():
    point = {"prune": {"method": "c", "sparsity": {"layer0": 0.5}}}
    earlier = EvolutionarySearch(GOAL, size_of, seed=0)
    search(earlier, 60)
    searcher = EvolutionarySearch(GOAL, size_of, seed=1, points_to_evaluate=[point], warm_start=earlier)
    results = search(searcher, 20)
    assert results[0][0]["prune"]["method"] == "c"
    assert results[0][0]["prune"]["sparsity"]["layer0"] == 0.5
    cold = np.mean([volume(search(EvolutionarySearch(GOAL, size_of, seed=s), 20)) for s in range(4)])
    assert volume(results) > cold


def test_the_goal_stays_what_it_is_and_the_space_is_set_once():
    searcher = EvolutionarySearch(GOAL)
    assert searcher.set_search_properties("score", "max", SPACE)
    assert searcher.goal == GOAL
    assert not searcher.set_search_properties(None, None, SPACE)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EvolutionarySearch("accuracy"), "goal: 'accuracy'"),
        (lambda: EvolutionarySearch(GOAL, 5), "cost_model: 5"),
        (lambda: EvolutionarySearch(GOAL, population_size=1), "population_size: 1"),
        (lambda: EvolutionarySearch(GOAL, initial=0), "initial: 0"),
        (lambda: EvolutionarySearch(GOAL, late_moves=1.0), "late_moves: 1.0"),
        (lambda: EvolutionarySearch(GOAL, late_moves="0.5"), "late_moves: '0.5'"),
        (lambda: EvolutionarySearch(GOAL, seed="a"), "seed: 'a'"),
        (lambda: BayesianSearch(GOAL, initial=2), "initial: 2"),
        (lambda: HybridSearch(GOAL, members=[EvolutionarySearch]), "members: 1"),
        (lambda: EvolutionarySearch(GOAL, warm_start=[1]), "warm_start"),
        (lambda: EvolutionarySearch(GOAL, warm_start="nowhere.json"), "warm_start: 'nowhere.json'"),
        (lambda: EvolutionarySearch(GOAL, points_to_evaluate={"a": 1}), "points_to_evaluate"),
        (
            lambda: EvolutionarySearch(GOAL).set_search_properties(None, None, {"a": tune.grid_search([1])}),
            "a grid_search",
        ),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_wrong_name_in_the_space_is_found_before_any_trial(digits_task):
    space = nc.compression_space(digits_task)
    space["prune"]["sparsity"]["nowhere"] = nc.sparsity()
    searcher = EvolutionarySearch(nc.Goal([nc.Objective("accuracy")]), nc.CostModel(digits_task))
    with pytest.raises(ConfigError, match="'nowhere'"):
        searcher.set_search_properties(None, None, space)


def test_a_searcher_pickles_small(digits_task):
    searcher = EvolutionarySearch(GOAL, nc.CostModel(digits_task))
    assert len(cloudpickle.dumps(searcher)) < 100_000


def ordinary(config):
    for step in range(3):
        tune.report({"loss": (config["x"] - 0.3) ** 2 + 1 / (step + 1), "price": config["n"] + config["x"]})


def test_drives_an_ordinary_trainable(ray_session, tmp_path):
    goal = nc.Goal([nc.Objective("loss", "min"), nc.Objective("price", "min")])
    tuner = tune.Tuner(
        ordinary,
        param_space={"x": tune.uniform(0, 1), "n": tune.randint(0, 4), "deep": {"k": tune.choice(["a", "b"])}},
        tune_config=tune.TuneConfig(
            search_alg=EvolutionarySearch(goal, seed=0), num_samples=20, max_concurrent_trials=2, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="plain", verbose=0),
    )
    results = nc.Results(tuner.fit(), goal=goal)
    assert len(results) == 20
    assert {trial.status for trial in results.trials} == {"completed"}
    assert results.best("price").metrics["price"] < 0.5


def test_a_metric_that_is_never_reported_is_named_after_the_first_trial(caplog):
    goal = nc.Goal([nc.Objective("accuracy"), nc.Objective("latencyms", "min")])
    searcher = EvolutionarySearch(goal, seed=0)
    searcher.set_search_properties(None, None, SPACE)
    for trial_id, result in (
        ("infeasible", {"feasible": False, "training_iteration": 1}),
        ("early", {"accuracy": 0.9, "latencyms": float("nan"), "training_iteration": 1}),
    ):
        searcher.suggest(trial_id)
        searcher.on_trial_complete(trial_id, result)
    assert not caplog.records
    for trial_id in ("first", "second"):
        searcher.suggest(trial_id)
        searcher.on_trial_complete(trial_id, {"accuracy": 0.9, "latency_ms": 2.0, "training_iteration": 1, "pid": 7})
    (warning,) = caplog.messages
    assert "'latencyms'" in warning
    assert warning.endswith(": accuracy, latency_ms")
