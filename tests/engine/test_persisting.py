"""Flushing waits for what was stored before it and for nothing else; a pin that is refused leaves nothing behind."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
import torch

from kvtier import KVLayout, PrefixCache
from kvtier.engine.persisting import Persister
from kvtier.tiers.errors import ConfigError, TierFullError

WAIT_S = 60.0  # a bound on hanging
LAYOUT = KVLayout(2, 2, 16, dtype="float32", block_size=16)


class SlowPager:
    """Persists when `may_end(seqs)` has returned; sequences in `failing` fail."""

    def __init__(self, may_end: Callable[[list[int]], None] = lambda seqs: None) -> None:
        self._may_end = may_end
        self.failing: set[int] = set()
        self.finished: list[int] = []

    def persist(self, seqs: list[int], *, timeout_s: float) -> None:
        self._may_end(seqs)
        if failed := self.failing.intersection(seqs):
            raise TierFullError(f"no room for {min(failed)}")

    def finish(self, seq: int) -> None:
        self.finished.append(seq)


@contextmanager
def in_thread(fn: Callable[[], None]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=fn)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(WAIT_S)
    assert not thread.is_alive()


# ---------------------------------------------------------------------- flush
def test_a_flush_ends_though_others_go_on_storing():
    num_added, is_over = 0, threading.Event()

    def until_another_waits(seqs: list[int]) -> None:
        seen = num_added
        while num_added == seen and not is_over.is_set():
            time.sleep(0.001)

    def go_on() -> None:
        nonlocal num_added
        while not is_over.is_set():
            persister.add(1000 + num_added)
            num_added += 1
            time.sleep(0.002)

    pager = SlowPager(until_another_waits)
    with closing(Persister(pager, WAIT_S)) as persister:
        try:
            with in_thread(go_on):
                try:
                    for seq in range(3):
                        persister.add(seq)
                        persister.flush(10.0)
                        assert seq in pager.finished
                    assert persister.num_open
                finally:
                    is_over.set()
        finally:
            is_over.set()
        persister.flush(WAIT_S)
        assert len(pager.finished) == 3 + num_added and persister.num_open == 0


def test_a_flush_waits_for_what_was_added_before_it_and_says_how_much_is_late():
    gates = {seq: threading.Event() for seq in (1, 2)}
    begun = threading.Event()

    def wait(seqs: list[int]) -> None:
        begun.set()
        for seq in seqs:
            assert gates[seq].wait(WAIT_S)

    pager = SlowPager(wait)
    with closing(Persister(pager, WAIT_S)) as persister:
        persister.add(1)
        assert begun.wait(WAIT_S)
        persister.add(2)  # has to wait for the next commit
        with pytest.raises(TimeoutError, match="2 stored prefixes"):
            persister.flush(0.02)
        with in_thread(lambda: persister.flush(WAIT_S)) as flushing:
            gates[1].set()
            flushing.join(0.05)
            assert flushing.is_alive() and 2 not in pager.finished
            gates[2].set()
        assert pager.finished == [1, 2]


def test_a_flush_raises_the_first_error_since_the_last_one():
    pager = SlowPager()
    pager.failing = {2, 3, 6}
    with closing(Persister(pager, WAIT_S)) as persister:
        done = [persister.add(seq) for seq in range(5)]
        with pytest.raises(TierFullError, match="no room for 2"):
            persister.flush(WAIT_S)
        assert [isinstance(one.exception(), TierFullError) for one in done] == [False, False, True, True, False]
        persister.flush(WAIT_S)
        for seq in (5, 6, 7):
            persister.add(seq)
        with pytest.raises(TierFullError, match="no room for 6"):
            persister.flush(WAIT_S)
        persister.flush(WAIT_S)
        assert persister.num_failed == 3 and sorted(pager.finished) == list(range(8))


def test_a_flush_does_not_wait_for_later_ones_of_a_batch_that_are_tried_alone():
    begun, first, last = threading.Event(), threading.Event(), threading.Event()

    def wait(seqs: list[int]) -> None:
        begun.set()
        assert (last if seqs == [2] else first).wait(WAIT_S)

    pager = SlowPager(wait)
    pager.failing = {1}
    with closing(Persister(pager, WAIT_S)) as persister:
        try:
            persister.add(0)
            assert begun.wait(WAIT_S)
            persister.add(1)
            seen: list[BaseException] = []

            def flush() -> None:
                try:
                    persister.flush(10.0)
                except BaseException as error:
                    seen.append(error)

            with in_thread(flush) as flushing:
                flushing.join(0.05)
                persister.add(2)  # in one batch with 1
                first.set()
            assert [str(error) for error in seen] == ["no room for 1"] and pager.finished == [0, 1]
        finally:
            first.set()
            last.set()
        persister.flush(WAIT_S)


# ---------------------------------------------------------------------- pins
@pytest.fixture
def cache() -> Iterator[PrefixCache]:
    sizes = dict(device_bytes=64 * LAYOUT.block_bytes, host_bytes=64 * LAYOUT.block_bytes)
    with PrefixCache.open(layout=LAYOUT, model_fingerprint="x", **sizes) as cache:
        cache.store(range(64), torch.zeros(2, 2, 2, 64, 16))
        cache.flush()
        yield cache


@pytest.mark.parametrize(
    "ids", [[], [-1], [1 << 32], torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3)], ids=lambda ids: str(list(ids))
)
def test_a_pin_of_what_is_no_prompt_leaves_no_sequence(cache, ids):
    with pytest.raises(ConfigError, match="token_ids"):
        cache.pin(ids, ttl=60.0)
    assert not cache.pager._core.sequences and not cache._pins


@pytest.mark.parametrize("ttl", [math.nan, 0, -1.0, -math.inf])
def test_a_pin_for_no_time_is_refused(cache, ttl):
    with pytest.raises(ConfigError, match=f"ttl={ttl!r}"):
        cache.pin(range(64), ttl=ttl)
    assert not cache.pager._core.sequences and not cache._pins


def test_a_pin_for_ever_ends_at_close(cache, monkeypatch):
    assert cache.pin(range(64), ttl=math.inf) == 64
    assert cache.match(range(64)) == 64 and cache.stats()["pinned_prefixes"] == 1
    left: list[int] = []
    close = cache.pager.close
    monkeypatch.setattr(cache.pager, "close", lambda: (left.append(len(cache.pager._core.sequences)), close()))
    cache.close()
    assert left == [0] and not cache._pins
