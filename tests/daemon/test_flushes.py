"""FLUSH answers when what the client committed is durable, also where another FLUSH of it is at work on that already."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.pager.wire import messages as m
from kvtier.tiers.cpu import HostEvent
from kvtier.tiers.errors import TierFullError
from kvtier.tiers.streams import AllDone

from .inside import InsideDaemon
from .raw import SIZE, WAIT_S, attach, key, put
from .running import wait_for


@pytest.fixture
def daemon(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=64 * SIZE, nvme_path=tmp_path / "nvme", nvme_bytes=4 << 20) as running:
        yield running


def slow_writes(daemon) -> HostEvent:
    """What is written to nvme from now on is down once the event is finished."""
    nvme, slow = daemon.store.core.nvme, HostEvent()
    write = nvme.write

    def write_late(*arguments):
        ticket = write(*arguments)
        ticket.event = AllDone([*ticket.event._events, slow])
        return ticket

    nvme.write = write_late
    return slow


def begin_flush(client, timeout_ms=60_000):
    return client.connection.begin(m.Flush(client.epoch, client.store, timeout_ms), m.Flushed)


def num_unflushed(daemon) -> int:
    (client,) = daemon.store.clients
    return sum(len(holdings.unflushed()) for holdings in client.holdings)


def test_a_flush_waits_for_what_another_one_is_writing(daemon):
    client, slow = attach(daemon.address), slow_writes(daemon)
    put(client, [1])
    first = begin_flush(client)
    wait_for(lambda: daemon.store.core.in_flight())
    second = begin_flush(client)
    wait_for(lambda: len(daemon.service.threads) == 2)
    with pytest.raises(TimeoutError):
        second._future.result(0.5)
    assert not first.is_over and num_unflushed(daemon) == 1
    slow.finish()
    first.result(WAIT_S)
    second.result(WAIT_S)
    assert num_unflushed(daemon) == 0
    client.goodbye()


def test_what_a_flush_could_not_write_is_the_next_ones_business(daemon):
    client, slow = attach(daemon.address), slow_writes(daemon)
    put(client, [1])
    with pytest.raises(TierFullError):
        begin_flush(client, 100).result(WAIT_S)
    assert num_unflushed(daemon) == 1
    slow.finish()
    begin_flush(client).result(WAIT_S)
    assert num_unflushed(daemon) == 0
    client.goodbye()


def test_a_block_committed_under_the_same_number_since_is_not_taken_for_flushed(daemon):
    client = attach(daemon.address)
    put(client, [1])
    (one,) = daemon.store.clients
    holdings = one.holdings[0]
    before = holdings.unflushed()
    (block,) = before
    client.unhold(0, key(1))
    assert holdings.unflushed() == {}
    with daemon.store.core.lock:
        holdings.group.ref(np.array([block]))
        holdings._end_reservations_of(np.array([block]), hold=True, is_private=np.array([False]))
    holdings.flushed(before)
    assert list(holdings.unflushed()) == [block]
    with daemon.store.core.lock:
        holdings.flushed(holdings.unflushed())
    client.goodbye()
