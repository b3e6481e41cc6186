"""Prefetch at work: it comes before demand asks, never in its way, and what became of it is counted."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from kvtier.pager import prefetching
from kvtier.pager.foresight import Foresight

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, Rig

DISK_BLOCK = 4096


def tokens(start: int, blocks: int = 4) -> list[int]:
    return list(range(start, start + BLOCK * blocks))


def opened(tmp_path, **options) -> Rig:
    return Rig(0, **({"pages": 16, "host": 16, "path": tmp_path / "s", "nvme_bytes": 400 * DISK_BLOCK} | options))


def computed(rig: Rig, token_ids: list[int]) -> int:
    seq = rig.start(token_ids)
    rig.prefill(seq)
    rig.settle()
    return seq


def go_on(rig: Rig, times: int = 12) -> None:
    """The background thread's looks."""
    for _ in range(times):
        rig.pager.poll()
        rig.settle()


def cold(rig: Rig, token_ids: list[int]) -> None:
    """Only on disk, and referred to by nobody."""
    rig.pager.park("passing", computed(rig, token_ids))
    rig.pager.forget("passing")
    group = rig.pager._core.groups[0]
    d = group.directory
    held = np.flatnonzero(d.nvme_valid & (d.host_slot >= 0) & (d.refs == 0))
    group.drop_host_copies(held, "test")
    group.evict(np.flatnonzero(d.nvme_valid & d.in_device(np.arange(len(d.page))) & (d.page >= 0)), "test")


def outcome(rig: Rig, name: str) -> int:
    return int(rig.pager.counters.get("prefetched_bytes", outcome=name)) // rig.layouts[0].block_bytes


def closed(rig: Rig) -> None:
    rig.settle()
    rig.pager.check_integrity()
    assert not rig.wrong
    rig.close()


def test_a_request_that_waits_has_its_blocks_brought_up(tmp_path):
    rig = opened(tmp_path)
    cold(rig, tokens(0))
    seq = rig.pager.begin()
    rig.pager.append(seq, [*tokens(0), 1, 2])
    assert rig.pager.match(tokens(0)).nvme_tokens == 16
    assert rig.pager.prefetch(seq) == 4
    go_on(rig)
    assert rig.pager.match(tokens(0)).device_tokens == 16
    rig.pager.adopt(seq)
    before = rig.pager.counters.get("moved_blocks", reason="demand")
    rig.prefill(seq)
    assert rig.pager.counters.get("moved_blocks", reason="demand") == before
    assert outcome(rig, "useful") == 4 + 4 and outcome(rig, "wasted") == 0  # both steps up were read from
    closed(rig)


def test_requests_come_up_in_the_order_in_which_they_were_named(tmp_path):
    rig = opened(tmp_path, pages=12, host=8)
    cold(rig, tokens(0))
    cold(rig, tokens(1000))
    seqs = []
    for start in (0, 1000):
        seqs.append(rig.pager.begin())
        rig.pager.append(seqs[-1], [*tokens(start), 1])
    rig.pager._prefetcher.pump()
    rig.pager.prefetch(seqs[0])
    rig.pager.prefetch(seqs[1])
    first = [move.blocks for move in rig.pager._core.groups[0].moves]
    d = rig.pager._core.groups[0].directory
    chain: list[bytes] = []
    rig.pager._core.chain("default").extend(chain, tokens(0))
    assert set(first[0].tolist()) == set(d.find(chain).tolist())
    go_on(rig)
    assert rig.pager.match(tokens(0)).device_tokens == 16
    closed(rig)


def test_prefetch_stops_while_a_lease_waits_and_leaves_what_is_referred_to(tmp_path):
    rig = opened(tmp_path, pages=8, host=8)
    busy = computed(rig, tokens(5000, 4))
    cold(rig, tokens(0))
    seq = rig.pager.begin()
    rig.pager.append(seq, [*tokens(0), 1])
    group = rig.pager._core.groups[0]
    group.awaited.append(np.array([0]))
    assert rig.pager.prefetch(seq) == 0
    group.awaited.clear()
    go_on(rig)
    assert rig.pager.residency(busy).device_tokens + rig.pager.residency(busy).host_tokens == 16
    table = rig.pager._core.sequences[busy].tables[0].ids
    assert group.directory.is_valid(table).all()
    closed(rig)


def test_few_bytes_are_in_flight_at_once(tmp_path, monkeypatch):
    rig = opened(tmp_path, pages=32, host=32)
    size = rig.layouts[0].block_bytes
    monkeypatch.setattr(prefetching, "IN_FLIGHT_BYTES", 3 * size)
    monkeypatch.setattr(prefetching, "BATCH_BYTES", size)
    cold(rig, tokens(0, 8))
    seq = rig.pager.begin()
    rig.pager.append(seq, [*tokens(0, 8), 1])
    assert rig.pager.prefetch(seq) == 3
    assert sum(len(m.blocks) for m in rig.pager._core.groups[0].moves) == 3
    go_on(rig, 40)
    assert rig.pager.match(tokens(0, 8)).device_tokens == 32
    closed(rig)


def test_what_leaves_unread_is_wasted_and_turns_the_predictor_down(tmp_path):
    rig = opened(tmp_path, pages=12, host=8)
    cold(rig, tokens(0))
    seq = rig.pager.begin()
    rig.pager.append(seq, [*tokens(0), 1])
    rig.pager.prefetch(seq)
    go_on(rig)
    rig.pager.release(seq)
    before = rig.pager._core.groups[0].thrift.least_chance
    for start in (2000, 3000, 4000, 5000):
        rig.pager.finish(computed(rig, tokens(start)))
    assert outcome(rig, "wasted") > 0
    assert rig.pager._core.groups[0].thrift.least_chance > before
    closed(rig)


def test_a_host_copy_that_has_gone_on_to_the_device_tier_has_done_its_part(tmp_path):
    for is_read in (True, False):
        rig = opened(tmp_path / str(is_read))
        cold(rig, tokens(0))
        seq = rig.pager.begin()
        rig.pager.append(seq, [*tokens(0), 1])
        rig.pager.prefetch(seq)
        go_on(rig)
        assert rig.pager.match(tokens(0)).device_tokens == 16
        group = rig.pager._core.groups[0]
        ids = group.host.block[group.host.block >= 0]
        group.drop_host_copies(ids, "test")
        assert outcome(rig, "wasted") == 0
        if is_read:
            rig.pager.adopt(seq)
        else:
            group.evict(ids, "test")
        assert (outcome(rig, "useful"), outcome(rig, "late"), outcome(rig, "wasted")) == (
            (8, 0, 0) if is_read else (0, 0, 8)
        )
        assert group.thrift._open_bytes == 0
        closed(rig)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_session_that_always_comes_back_is_there_before_it_asks(tmp_path):
    """Parked sessions think for a minute. After some turns their blocks are in the device tier when they return."""
    clock = Clock()
    rig = opened(tmp_path, pages=64, host=64, clock=clock, nvme_bytes=2000 * DISK_BLOCK)
    names = [f"chat{i}" for i in range(3)]
    for i, name in enumerate(names):
        rig.pager.park(name, computed(rig, tokens(1000 * i, 2)))
    hits = []
    for _ in range(12):
        for name in names:
            for _ in range(5):
                clock.now_s += 3.0
                go_on(rig, 3)
            before = rig.pager.counters.get("hit_tokens", tier="device")
            seq, _ = rig.pager.resume(name)
            rig.say(seq, [1])
            hits.append(rig.pager.counters.get("hit_tokens", tier="device") - before)
            rig.pager.park(name, seq)
    assert hits[: len(names)] == [0] * len(names)  # nothing is known yet
    assert np.mean(hits[-20:]) >= 4  # of 8 tokens
    assert outcome(rig, "wasted") == 0
    closed(rig)


def test_foresight_can_be_turned_off(tmp_path):
    clock = Clock()
    rig = opened(tmp_path, prefetch=False, clock=clock)
    rig.pager.finish(computed(rig, tokens(0)))
    foresight = rig.pager._prefetcher.foresight
    assert foresight.num_idle == 1
    clock.now_s = 10.0
    due_s = foresight.next_s()
    go_on(rig)
    assert foresight.next_s() == due_s < clock.now_s  # nobody asked it
    closed(rig)


def test_room_for_a_prefetch_is_made_with_what_nobody_refers_to(tmp_path):
    rig = opened(tmp_path)
    used, cached, over = (computed(rig, tokens(start, 2)) for start in (0, 1000, 2000))
    held, left, gone = (rig.pager._core.sequences[seq].tables[0].ids.copy() for seq in (used, cached, over))
    rig.pager.finish(cached)
    rig.pager.release(over)
    may_leave, group = rig.pager._prefetcher._may_leave, rig.pager._core.groups[0]
    blocks = np.concatenate([held, left, gone])
    assert may_leave(group, blocks, True).tolist() == [*left, *gone]
    assert may_leave(group, blocks, False).tolist() == gone.tolist()
    group.directory.fetched[left] = 1
    assert may_leave(group, blocks, True).tolist() == gone.tolist()
    group.directory.fetched[left] = 0
    closed(rig)


def in_device(rig: Rig, token_ids: list[int]) -> int:
    return rig.pager.match(token_ids).device_tokens // BLOCK


def test_who_waits_for_more_than_there_is_room_for_is_passed_and_the_order_is_that_of_the_last_call(tmp_path):
    rig = opened(tmp_path, host=40)
    cold(rig, tokens(1000, 3))
    cold(rig, tokens(0, 12))
    large, small = (rig.pager.begin() for _ in range(2))
    rig.pager.append(large, [*tokens(0, 12), 1])
    rig.pager.append(small, [*tokens(1000, 3), 1])
    assert rig.pager.prefetch(large) > 0
    go_on(rig)
    assert in_device(rig, tokens(0, 12)) == 10  # of 16 pages, as far as new tokens leave room
    rig.pager.prefetch(small)
    go_on(rig)
    assert rig.pager.match(tokens(1000, 3)).host_tokens == 3 * BLOCK  # the large one does not wait for host slots
    group = rig.pager._core.groups[0]
    d = group.directory
    rig.pager.prefetch([small, large])
    came = np.flatnonzero((d.page >= 0) & d.in_device(np.arange(len(d.page))))
    group.evict(came, "test")
    go_on(rig)
    assert in_device(rig, tokens(1000, 3)) == 3 and in_device(rig, tokens(0, 12)) == 7
    closed(rig)


def test_a_prefix_that_somebody_will_ask_for_comes_up_though_nobody_has_a_sequence_over_it(tmp_path, monkeypatch):
    rig = opened(tmp_path, pages=32, host=32)
    monkeypatch.setattr(prefetching, "IN_FLIGHT_BYTES", 2 * rig.layouts[0].block_bytes)
    cold(rig, tokens(0, 8))
    for is_for_anybody, device_tokens in ((False, 0), (True, 32)):
        seq = rig.pager.begin()
        rig.pager.attach(seq, tokens(0, 8))
        assert rig.pager.prefetch(seq, for_anybody=is_for_anybody) == 2
        rig.pager.finish(seq)
        go_on(rig, 40)
        assert rig.pager.match(tokens(0, 8)).device_tokens == device_tokens
        assert not rig.pager._prefetcher._wants
    closed(rig)


def test_a_hint_that_finds_no_room_is_given_up(tmp_path):
    rig = opened(tmp_path, pages=12, host=40)
    cold(rig, tokens(0, 8))
    seq = rig.pager.begin()
    rig.pager.attach(seq, tokens(0, 8))
    rig.pager.prefetch(seq, for_anybody=True)
    rig.pager.finish(seq)
    busy = computed(rig, tokens(5000, 8))
    go_on(rig, 40)
    assert not rig.pager._prefetcher._wants and in_device(rig, tokens(0, 8)) < 8
    assert rig.pager.residency(busy).device_tokens > 0
    closed(rig)


class Named:
    """Foresight that names whom the test says."""

    def __init__(self, monkeypatch) -> None:
        self.next: list[tuple[str, float]] = []
        monkeypatch.setattr(Foresight, "next_s", lambda _: 0.0 if self.next else math.inf)
        monkeypatch.setattr(Foresight, "due", lambda *_: [self.next.pop(0) for _ in tuple(self.next)])


def parked(rig: Rig, name: str, token_ids: list[int]) -> None:
    rig.pager.park(name, computed(rig, token_ids))
    rig.settle()


def test_a_prediction_that_does_not_fit_is_acted_upon_once_and_starves_nobody(tmp_path, monkeypatch):
    rig, named = opened(tmp_path, host=40), Named(monkeypatch)
    parked(rig, "small", tokens(1000, 2))
    group = rig.pager._core.groups[0]
    group.drop_host_copies(group.host.block[group.host.block >= 0], "test")
    parked(rig, "large", tokens(0, 14))
    named.next = [("large", 0.99), ("small", 0.99)]
    go_on(rig)
    assert in_device(rig, tokens(0, 14)) == 10 and rig.pager.match(tokens(1000, 2)).host_tokens == 2 * BLOCK
    started = outcome(rig, "started")
    assert started == 12 and not rig.pager._prefetcher._wants
    rig.pager._prefetcher.foresight.forget("large")
    for start in range(5000, 17000, 1000):
        rig.pager.finish(computed(rig, tokens(start, 8)))
        go_on(rig, 3)
    assert outcome(rig, "started") == started and outcome(rig, "wasted") <= started
    closed(rig)


def test_a_prediction_is_dropped_once_foresight_gives_the_session_up(tmp_path, monkeypatch):
    rig, named = opened(tmp_path, host=40), Named(monkeypatch)
    parked(rig, "chat", tokens(0, 4))
    group = rig.pager._core.groups[0]
    group.awaited.append(np.array([0]))  # a lease waits, so nothing may start
    named.next = [("chat", 0.99)]
    rig.pager.poll()
    assert list(rig.pager._prefetcher._wants) == ["chat"]
    rig.pager._prefetcher.foresight.forget("chat")
    group.awaited.clear()
    go_on(rig)
    assert not rig.pager._prefetcher._wants and outcome(rig, "started") == 0
    closed(rig)


def test_each_block_is_brought_up_once_for_a_prediction(tmp_path, monkeypatch):
    """It leaves again before all have come: that is waste, and no reason to bring it once more."""
    rig, named = opened(tmp_path, host=40), Named(monkeypatch)
    monkeypatch.setattr(prefetching, "IN_FLIGHT_BYTES", 2 * rig.layouts[0].block_bytes)
    parked(rig, "chat", tokens(0, 8))
    left = rig.pager._prefetcher._once(rig.pager._prefetcher._idle["chat"]).left
    named.next = [("chat", 0.99)]
    group = rig.pager._core.groups[0]
    for _ in range(40):
        go_on(rig, 1)
        d = group.directory
        group.evict(np.flatnonzero((d.page >= 0) & d.in_device(np.arange(len(d.page)))), "test")
    assert 8 <= outcome(rig, "started") <= left + 1
    closed(rig)


def test_so_many_keys_of_idle_sessions_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetching, "MAX_IDLE_KEYS", 10)
    rig = opened(tmp_path, pages=40, host=40)
    for name, blocks in (("a", 4), ("b", 3), ("a", 4), ("c", 3), ("d", 2)):
        parked(rig, name, tokens(0, blocks))
    prefetcher = rig.pager._prefetcher
    assert list(prefetcher._idle) == ["a", "c", "d"] and prefetcher._idle_keys == 9
    assert not prefetcher.foresight.knows("b") and prefetcher.foresight.knows("d")
    prefetcher.forget("a")
    rig.pager.resume("d")
    assert list(prefetcher._idle) == ["c"] and prefetcher._idle_keys == 3
    parked(rig, "long", tokens(0, 11))  # alone more than is remembered
    assert not prefetcher._idle and prefetcher._idle_keys == 0
    closed(rig)
