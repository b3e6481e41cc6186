"""Clients and daemon over a simulated network: partial frames, delays, resets, processes that die with copies under way.

A failure says `again: python tests/simulation/sim_clients.py SEED STEPS`. --seed N runs N * 1000 and following.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvtier.pager.rules import Rule, Rules

sys.path.insert(0, str(Path(__file__).parent))
import sim_clients
from repeating import run_again_and_elsewhere

SEEDS, MIN_EVENTS = 8, 1000  # events of a seed, on average


def test_nothing_wrong_is_read_whatever_the_network_does(seed):
    worlds = [sim_clients.run(1000 * seed + number) for number in range(SEEDS)]
    events = sum(world.trace.total for world in worlds)
    print(f"{events} events")
    assert events > SEEDS * MIN_EVENTS
    assert all(any(world.trace.counts[kind] for world in worlds) for kind in ("sent", "came", "reset", "killed"))


@pytest.mark.parametrize("rule", [Rule.PINS_DIE_WITH_THE_PROCESS, Rule.OLD_EPOCH_CHANGES_NOTHING])
def test_a_rule_of_the_daemon_that_is_taken_out_is_missed(rule):
    def fails(number: int) -> bool:
        try:
            sim_clients.run(number, rules=Rules.without(rule))
        except AssertionError:
            return True
        return False

    assert any(map(fails, range(6, 46)))


def test_the_same_seed_gives_the_same_trace():
    assert run_again_and_elsewhere(sim_clients, 800).trace.total > 200


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_seeds_of_sockets(seed):
    events = sum(sim_clients.run(1_000_000 + 5000 * seed + number).trace.total for number in range(5000))
    print(f"{events} events")
