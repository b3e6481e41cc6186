"""A trace in time: waits are those of the links, prefetch hides them, and demand never waits for more than a chunk of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvtier.pager.policies.registry import NAMES
from kvtier.pager.thrift import Thrift
from kvtier.tools.bench.prefetch import without_pattern
from kvtier.tools.replay.links import CHUNK_BYTES, Link
from kvtier.tools.replay.model import Machine
from kvtier.tools.replay.oracles import releases
from kvtier.tools.replay.timed import Mode, TimedReplay
from kvtier.tools.replay.trace import Recorded, trace_of

MACHINE = Machine(bytes_per_token=1 << 20, prefill_tokens_per_s=1000.0, host_bytes_per_s=1e9, nvme_bytes_per_s=1e8)
SIZES = {"device": 8, "host": 64, "nvme": 10_000}


def sessions(count: int, turns: int, think_s: float):
    """Chats of eight blocks and one more per turn, one after the other; only the device tier is too small for them."""
    lines = []
    for number in range(count):
        ids = list(range(1000 * number, 1000 * number + 8))
        for turn in range(turns):
            lines.append(Recorded(1e3 * (turn * think_s + number), tuple(ids), 16 * len(ids), 10, False))
            ids.append(1000 * number + 8 + turn)
    lines.sort(key=lambda one: one.at_ms)
    return trace_of("sessions", lines, 16)


def mean_wait(trace, mode: Mode, sizes=None, machine: Machine = MACHINE) -> tuple[float, object]:
    found = TimedReplay(trace, "lru", sizes or SIZES, machine, mode).run()
    return float(found.wait_s.mean()), found


def test_a_link_serves_demand_in_order_and_prefetch_in_between():
    link, done = Link(1e9), []
    job = link.prefetch(0.0, 4e9, done.append)
    link.advance(1.0)
    assert job.left == pytest.approx(3e9)
    there_s = link.demand(1.0, 1e9)
    assert there_s == pytest.approx(2.0 + CHUNK_BYTES / 1e9)  # a chunk was on its way
    assert link.demand(1.5, 1e9) == pytest.approx(there_s + 1.0)
    link.advance(10.0)
    assert done and done[0] == pytest.approx(there_s + 1.0 + 3.0)


def test_by_demand_a_returning_session_waits_for_its_blocks():
    trace = sessions(6, 6, 40.0)
    wait_s, found = mean_wait(trace, Mode())
    assert wait_s > 0 and found.prefetched_bytes == 0
    one = 16 * MACHINE.bytes_per_token / MACHINE.host_bytes_per_s
    later = found.wait_s[6:]
    assert later.mean() >= 8 * one  # all of it has left the device tier when it comes back


def test_what_waits_in_the_queue_is_loaded_meanwhile():
    lines = [Recorded(1e3 * n, tuple(range(1000 * n, 1000 * n + 8)), 128, 10, False) for n in range(12)]
    lines += [Recorded(60_000.0, (*range(1000 * n, 1000 * n + 8), 900 + n), 144, 10, False) for n in range(12)]
    trace = trace_of("burst", lines, 16)
    slower = replace(MACHINE, prefill_tokens_per_s=100.0)  # computing takes longer than loading does
    alone, _ = mean_wait(trace, Mode(), SIZES | {"host": 1000}, slower)
    queued, found = mean_wait(trace, Mode(queue=True), SIZES | {"host": 1000}, slower)
    assert queued < 0.5 * alone and found.wasted_share == 0


def test_parked_sessions_that_always_come_back_are_there_before():
    trace = sessions(6, 40, 60.0)
    roomy = SIZES | {"device": 1000, "host": 1000}
    alone, _ = mean_wait(trace, Mode(park_s=3.0), roomy)
    ahead, found = mean_wait(trace, Mode(park_s=3.0, next_turn=True), roomy)
    assert alone > 0 and ahead < 0.5 * alone
    assert found.wasted_share < 0.2 and found.prefetched_bytes > 0


def test_what_was_called_off_on_its_way_is_neither_open_nor_wasted():
    slow = replace(MACHINE, host_bytes_per_s=2e6)
    replay = TimedReplay(sessions(6, 40, 60.0), "lru", SIZES | {"device": 1000}, slow, Mode(park_s=3.0, next_turn=True))
    called_off, undone = [], Thrift.undone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Thrift, "undone", lambda one, nbytes: called_off.append(nbytes) or undone(one, nbytes))
        found = replay.run()
    assert sum(called_off) > 0
    assert all(one._open_bytes == 0 for one in found.thrift.values())


@pytest.mark.parametrize("policy", [name for name in NAMES if name != "sliding_window"])
def test_a_request_without_blocks_waits_for_none(policy):
    lines = [Recorded(1e3 * n, (n, n + 1) if n % 2 else (), 32 * (n % 2), 1, False) for n in range(6)]
    found = TimedReplay(trace_of("t", lines, 16), policy, SIZES, MACHINE, Mode(True, True, 2.0)).run()
    assert found.wait_s[::2].tolist() == [0.0] * 3


def test_full_tiers_are_left_alone():
    trace = sessions(40, 10, 60.0)
    alone, _ = mean_wait(trace, Mode())
    ahead, found = mean_wait(trace, Mode(next_turn=True))
    assert ahead == pytest.approx(alone) and found.prefetched_bytes == 0


@pytest.mark.parametrize("park_s", [None, 5.0])
def test_without_a_pattern_nothing_is_lost(park_s):
    trace = without_pattern(600)
    alone, _ = mean_wait(trace, Mode(park_s=park_s), SIZES | {"device": 200, "host": 2000})
    both, found = mean_wait(trace, Mode(True, True, park_s), SIZES | {"device": 200, "host": 2000})
    assert both <= alone * 1.01
    assert found.prefetched_bytes < 0.02 * found.demand_bytes + 1


def test_hits_are_the_same_however_blocks_travel():
    trace = sessions(6, 10, 40.0)
    hits = {mode: mean_wait(trace, mode)[1].hit_tokens for mode in (Mode(), Mode(True), Mode(True, True))}
    assert len(set(hits.values())) == 1


@pytest.mark.parametrize("park_s", [None, 5.0])
def test_what_was_given_up_is_counted_as_it_is(park_s):
    trace = sessions(12, 10, 40.0)
    mode = Mode(queue=True, next_turn=True, park_s=park_s)
    replay = TimedReplay(trace, "auto", SIZES, MACHINE, mode, releases(trace))
    replay.run()
    assert any(tier._num_given_up for tier in replay._tiers.values())
    for tier in replay._tiers.values():
        assert tier._num_given_up == np.count_nonzero(tier.held & tier.released)
        assert tier.room() == tier.capacity - tier.lent - np.count_nonzero(tier.held & ~tier.released)
