"""FLUSH answers when what the client committed is durable, also where another FLUSH of it is at work on that already."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.pager.wire import messages as m
from kvtier.tiers.cpu import CpuBackend, HostEvent
from kvtier.tiers.errors import BlockMissError, ProtocolError, TierFullError
from kvtier.tiers.streams import AllDone

from ..pager.harness import Rig
from .inside import InsideDaemon
from .raw import SIZE, WAIT_S, attach, key, put
from .running import wait_for

TOKENS = list(range(100, 140))


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


def computed(daemon) -> tuple[Rig, int]:
    """A client's pager that has just computed ten blocks, and their sequence."""
    rig = Rig(daemon=daemon.address, backend=CpuBackend(poison=True), pages=32)
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    return rig, seq


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


def test_a_prefix_that_others_committed_is_durable_when_it_was_persisted(daemon):
    """They have flushed nothing, and we have committed nothing."""
    rigs = []
    for _ in range(2):
        rig, seq = computed(daemon)
        rigs.append(rig)
        wait_for(lambda rig=rig: rig.pager.match(TOKENS).tokens == len(TOKENS) and not rig.pager._core.in_flight())
    (store,) = daemon.models._stores.values()
    d = store.core.groups[0].directory
    assert d.is_named.sum() == 10 and not d.nvme_valid.any()  # beside reserved slots, which have no name
    rigs[1].pager.persist([seq])
    assert d.nvme_valid[d.is_named].sum() == 10
    with store.core.lock:
        store.check_integrity()
    for rig in rigs:
        rig.close()


def test_a_prefix_of_an_earlier_request_is_durable_when_it_was_persisted_with_a_later_one(daemon):
    """The client had let go of it: what it holds again was not committed since."""
    rig, seq = computed(daemon)
    rig.pager.finish(seq)
    (store,) = daemon.models._stores.values()
    (client,) = store.clients
    wait_for(lambda: (rig.pager.poll(), not rig.pager._core.in_flight() and not client.holdings[0].held)[1])
    seq = rig.start([*TOKENS, *range(200, 220)])
    rig.prefill(seq)
    rig.pager.persist([seq])
    d = store.core.groups[0].directory
    assert d.nvme_valid[d.is_named].sum() == d.is_named.sum() == 15
    rig.close()


def test_what_is_named_and_not_there_is_said_so(daemon):
    client = attach(daemon.address)
    put(client, [1])
    with pytest.raises(BlockMissError, match="1 of these 2"):
        client.connection.call(
            m.Flush(client.epoch, client.store, 60_000, 0, key(1) + key(2)), m.Flushed, timeout_s=WAIT_S
        )
    with pytest.raises(ProtocolError):
        client.connection.call(m.Flush(client.epoch, client.store, 60_000, 9, key(1)), m.Flushed, timeout_s=WAIT_S)
    client.goodbye()


def test_a_block_that_is_named_often_is_written_once(daemon):
    client = attach(daemon.address)
    put(client, [1])
    message = m.Flush(client.epoch, client.store, 60_000, 0, 100 * key(1))
    client.connection.call(message, m.Flushed, timeout_s=WAIT_S)
    assert daemon.store.core.nvme.status()["used_slots"] == [1]
    client.goodbye()


def test_a_block_that_the_daemon_has_lost_is_put_there_again(daemon):
    """Its client still has it in a page."""
    rig, seq = computed(daemon)
    rig.pager.persist([seq])
    store = daemon.store
    with store.core.locked():
        group = store.core.groups[0]
        block = group.directory.find([rig.pager.block_keys(seq, 0, 4)[0]])
        group.leave_host(block[group.directory.in_host(block)])
        group.cold.lose_copies(block)
    with pytest.raises(TierFullError, match="1 of these"):
        rig.pager.persist([seq])
    wait_for(lambda: (rig.pager.poll(), group.directory.find([rig.pager.block_keys(seq, 0, 4)[0]])[0] >= 0)[1])
    rig.pager.persist([seq])
    rig.close()
