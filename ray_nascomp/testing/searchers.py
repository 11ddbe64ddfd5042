"""What every searcher of a goal has to do: a suite of tests to run on a searcher of one's own.

In a test module:

    class TestMySearcher(SearcherConformance):
        def make(self, goal, cost_model=None, **options):
            return MySearcher(goal, cost_model, **options)

pytest then runs every test below on it. No Ray instance is needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from ray_nascomp.goals import Constraint, Goal
from ray_nascomp.space import Space
from ray_nascomp.testing.problems import Problem, conditional, mixed

_TRIALS = 24


def run_search(
    searcher: Searcher, problem: Problem, trials: int, parallel: int = 1, first: int = 0
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Drives a searcher as Tune does, without Ray.

    Args:
        searcher: Any Tune searcher; it is told of the space if it does not know it.
        problem: What is searched.
        trials: Number of trials.
        parallel: Number of trials that run at any time.
        first: Number of the first trial, for a search that goes on.

    Returns:
        Configs and metrics, in the order in which trials end; fewer where the space is used up.
    """
    searcher.set_search_properties(None, None, dict(problem.space))
    running: list[tuple[str, dict[str, Any]]] = []
    results: list[tuple[dict[str, Any], dict[str, float]]] = []

    def end_one() -> None:
        trial_id, config = running.pop(0)
        metrics = problem.evaluate(config)
        searcher.on_trial_complete(trial_id, {**metrics, "training_iteration": 1, "done": True})
        results.append((config, metrics))

    for number in range(first, first + trials):
        config: Any = searcher.suggest(f"trial{number}")
        if config == Searcher.FINISHED:
            break
        if not isinstance(config, dict):
            raise AssertionError(f"suggest gave {config!r} while {len(running)} trials were running")
        running.append((f"trial{number}", config))
        if len(running) == parallel:
            end_one()
    while running:
        end_one()
    return results


class SearcherConformance(ABC):
    """Tests of a searcher's contract; derive from it and write `make`."""

    @abstractmethod
    def make(
        self, goal: Goal, cost_model: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None, **options: Any
    ) -> Searcher:
        """The searcher under test; `options` are among seed, points_to_evaluate and warm_start."""

    def test_suggestions_are_whole_valid_and_new(self) -> None:
        """Every key, only allowed values, inactive dimensions canonical, nothing twice."""
        problem = mixed()
        results = run_search(self.make(problem.goal, problem.known, seed=3), problem, _TRIALS)
        space = Space(problem.space)
        assert len({space.key(config) for config, _ in results}) == len(results) == _TRIALS
        for config, _ in results:
            assert config == space.canonical(config)
            assert all(d.contains(value) for d, value in zip(space.dimensions, space.values(config), strict=True))

    def test_pending_trials_are_not_suggested_again(self) -> None:
        """Eight trials run at any time and all differ."""
        problem = conditional()
        results = run_search(self.make(problem.goal, problem.known, seed=1), problem, _TRIALS, parallel=8)
        space = Space(problem.space)
        assert len({space.key(config) for config, _ in results}) == _TRIALS

    def test_the_same_seed_gives_the_same_search(self) -> None:
        """The seed is all the randomness there is."""
        problem = mixed()
        one, other = (run_search(self.make(problem.goal, problem.known, seed=5), problem, 14) for _ in range(2))
        assert one == other

    def test_a_restored_search_goes_on_as_the_uninterrupted_one(self, tmp_path: Path) -> None:
        """`save` and `restore` keep everything, a running trial and the generator included."""
        problem = mixed()
        searcher = self.make(problem.goal, problem.known, seed=2)
        run_search(searcher, problem, 16)
        searcher.suggest("running")
        searcher.save(str(tmp_path / "state"))
        restored = self.make(problem.goal, problem.known, seed=99)
        restored.restore(str(tmp_path / "state"))
        assert run_search(searcher, problem, 6, first=16) == run_search(restored, problem, 6, first=16)

    def test_known_costs_never_break_a_constraint(self) -> None:
        """No trial is spent on what is known to be infeasible."""
        problem = mixed()
        goal = Goal(problem.goal.objectives, [Constraint("size", "<=", 0.4)])
        results = run_search(self.make(goal, problem.known, seed=0), problem, _TRIALS)
        assert len(results) == _TRIALS
        assert max(metrics["size"] for _, metrics in results) <= 0.4

    def test_inactive_dimensions_are_canonical(self) -> None:
        """A dimension that does not matter has its canonical value."""
        problem = conditional()
        results = run_search(self.make(problem.goal, problem.known, seed=0), problem, _TRIALS)
        assert all(config["wide"]["width"] == 0 for config, _ in results if config["branch"] != "wide")
        assert all(config["deep"]["depth"] == 1 for config, _ in results if config["branch"] != "deep")

    def test_bad_ends_of_trials_are_survived(self) -> None:
        """NaN, missing, infeasible, early and failed results do not stop the search."""
        problem = mixed()
        searcher = self.make(problem.goal, problem.known, seed=0)
        searcher.set_search_properties(None, None, dict(problem.space))
        ends: list[dict[str, Any] | None] = [
            {"accuracy": math.nan, "size": 0.5},
            {"size": 0.5},
            {"accuracy": "high", "size": 0.5},
            {"accuracy": 0.1, "size": 0.5, "feasible": False, "reason": "too thin"},
            {"accuracy": 0.1, "size": 0.5, "final": False},
            None,
        ]
        for number in range(4 * len(ends)):
            config = searcher.suggest(f"bad{number}")
            assert isinstance(config, dict)
            end = ends[number % len(ends)]
            if end is None:
                searcher.on_trial_complete(f"bad{number}", None, error=number % 2 == 0)
            else:
                searcher.on_trial_complete(f"bad{number}", {**end, "training_iteration": 1})
        searcher.on_trial_complete("never heard of", None, error=True)
        assert len(run_search(searcher, problem, 8)) == 8

    def test_points_are_tried_first(self) -> None:
        """`points_to_evaluate` come before anything else."""
        problem = conditional()
        point = {"branch": "wide", "wide": {"width": 3}, "deep": {"depth": 1}, "bias": 0.5}
        results = run_search(self.make(problem.goal, problem.known, seed=0, points_to_evaluate=[point]), problem, 2)
        assert results[0][0] == point

    def test_earlier_results_are_not_repeated(self, tmp_path: Path) -> None:
        """`warm_start` from a saved state knows what was tried."""
        problem = mixed()
        earlier = self.make(problem.goal, problem.known, seed=0)
        before = run_search(earlier, problem, 12)
        earlier.save(str(tmp_path / "state"))
        searcher = self.make(problem.goal, problem.known, seed=0, warm_start=tmp_path / "state")
        after = run_search(searcher, problem, 12)
        space = Space(problem.space)
        assert len({space.key(config) for config, _ in (*before, *after)}) == 24

    def test_a_used_up_space_is_finished(self) -> None:
        """A finite space is searched whole, once, and then `FINISHED`."""
        problem = conditional()
        space = {**problem.space, "bias": 0.0, "branch": "wide"}
        small = Problem("small", problem.goal, space, problem.evaluate, problem.known, (0.0, 0.0), (2.0, 10.0))
        searcher = self.make(small.goal, small.known, seed=0)
        results = run_search(searcher, small, 200)
        affordable = {(width, depth) for width in range(7) for depth in [1]}
        assert {(c["wide"]["width"], c["deep"]["depth"]) for c, _ in results} == affordable
        beyond: Any = searcher.suggest("one more")
        assert beyond == Searcher.FINISHED
