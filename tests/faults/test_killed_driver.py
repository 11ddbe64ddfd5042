from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from killing import KilledSearch, quiet_sequence

pytestmark = pytest.mark.starts_ray


def search_with_kills(search: KilledSearch, kills: int, most: int, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(kills):
        assert search.run_until_killed(rng, most), "the search was through before it was killed: too few trials"
        if number == kills // 2:
            search.move()
    search.run("restore")


def in_order(search: KilledSearch) -> list[dict]:
    return [entry["config"] for entry in search.state()]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_kills_and_a_moved_folder_change_nothing(tmp_path):
    search = KilledSearch(tmp_path, trials=14, seconds=0.05)
    search_with_kills(search, kills=2, most=4, seed=1)
    search.assert_nothing_lost(14)
    assert in_order(search) == quiet_sequence(14)


@pytest.mark.minutes
@pytest.mark.timeout(1800)
def test_twenty_kills_of_a_search_of_one_trial_at_a_time_change_nothing(tmp_path):
    search = KilledSearch(tmp_path, trials=60, seconds=0.1)
    search_with_kills(search, kills=20, most=4, seed=2)
    search.assert_nothing_lost(60)
    assert in_order(search) == quiet_sequence(60)


@pytest.mark.minutes
@pytest.mark.timeout(1800)
def test_twenty_kills_of_a_parallel_search_lose_nothing(tmp_path):
    search = KilledSearch(tmp_path, trials=60, seconds=0.2, parallel=4)
    search_with_kills(search, kills=20, most=5, seed=3)
    search.assert_nothing_lost(60)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_actors_killed_in_a_third_of_the_trials_change_nothing(tmp_path):
    search = KilledSearch(tmp_path, trials=10, seconds=0.0, deaths=0.45)
    search.run("start")
    assert len(list(tmp_path.glob("computed.died-*"))) >= 3
    search.assert_nothing_lost(10)
    assert in_order(search) == quiet_sequence(10)


@pytest.mark.minutes
@pytest.mark.timeout(900)
def test_actors_killed_in_a_third_of_sixty_trials_change_nothing(tmp_path):
    search = KilledSearch(tmp_path, trials=60, seconds=0.0, deaths=0.3)
    search.run("start")
    assert len(list(tmp_path.glob("computed.died-*"))) == 17
    search.assert_nothing_lost(60)
    assert in_order(search) == quiet_sequence(60)
