"""The real pager under simulated time, copies, disks, kills and power losses: 200 seeds, a million events.

A failure says `again: python tests/simulation/replay.py SEED OPERATIONS`. --seed N runs N * 1000 and following.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import replay
from repeating import run_again_and_elsewhere

SEEDS, BATCH = 200, 25
EVENTS = 5000  # of a seed: a million in all
MOST_OPERATIONS = 3000  # some seeds have no store, and fewer events
REGRESSIONS = [166, 199, 239, 286, 299, 364, 1010]  # found something once


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_nothing_wrong_is_read_and_nothing_acknowledged_is_lost(first, seed):
    seeds = range(1000 * seed + first, 1000 * seed + first + BATCH)
    events = sum(replay.run(number, MOST_OPERATIONS, EVENTS).trace.total for number in seeds)
    print(f"{events} events")
    assert events >= BATCH * EVENTS


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_seeds_that_once_found_something(seed):
    replay.run(seed, 260)


def test_the_same_seed_gives_the_same_trace():
    assert run_again_and_elsewhere(replay, 150).trace.total > 500


@pytest.mark.soak
@pytest.mark.timeout(36000)
def test_many_seeds(seed):
    events = sum(replay.run(1_000_000 + 20_000 * seed + i).trace.total for i in range(20_000))
    print(f"{events} events")
