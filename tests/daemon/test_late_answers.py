"""Answers that come after their time: what they give is not lost, and GOODBYE is not taken back."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.pager.wire import messages as m
from kvtier.tiers.errors import TierUnavailableError
from kvtier.tiers.layout import KVLayout

from .inside import InsideDaemon
from .running import wait_for
from .test_protocol import attach, key, put

HOST_BYTES = 1 << 20
SOON_S = 0.2


@pytest.fixture
def daemon(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=HOST_BYTES) as inside:
        yield inside


class HeldUp:
    """The client's thread for replies stands still after the next one was read."""

    def __init__(self, connection) -> None:
        self.has_come, self.may_go_on = threading.Event(), threading.Event()
        parse = connection._transport.receive_into

        def receive_into(target):
            count = parse(target)
            self.has_come.set()
            assert self.may_go_on.wait(60)
            return count

        connection._transport.receive_into = receive_into


@pytest.mark.parametrize("what", ["reserve", "lease"])
def test_slots_that_come_too_late_are_given_back(daemon, what):
    client = attach(daemon.address)
    put(client, [1])
    wait_for(lambda: daemon.store.pinned_slots() == 0)
    held_up = HeldUp(client.connection)
    if what == "reserve":
        message, kind = m.Reserve(client.epoch, client.store, 0, 4), m.Slots
    else:
        message, kind = m.Lease(client.epoch, client.store, 0, key(1), 60_000), m.Leased
    reply = client.connection.begin(message, kind)
    assert held_up.has_come.wait(60)
    assert daemon.store.pinned_slots() > 0
    with pytest.raises(TierUnavailableError, match="did not answer"):
        reply.result(SOON_S)
    held_up.may_go_on.set()
    wait_for(lambda: daemon.store.pinned_slots() == 0)
    assert client.connection.call(m.Lookup(client.store, key(1)), m.Found)  # and the connection lives
    client.goodbye()


@pytest.mark.parametrize("hold", [True, False])
def test_a_hold_that_comes_too_late_ends_the_connection_that_asked(daemon, hold):
    client = attach(daemon.address)
    put(client, [1])
    held_up = HeldUp(client.connection)
    reply = client.connection.begin(m.Lookup(client.store, key(1), hold=hold), m.Found)
    assert held_up.has_come.wait(60)
    threading.Timer(2 * SOON_S, held_up.may_go_on.set).start()
    with pytest.raises(TierUnavailableError, match="did not answer"):
        reply.result(SOON_S)
    if hold:
        wait_for(lambda: client.connection.is_lost)
    else:
        assert client.connection.call(m.Lookup(client.store, key(1)), m.Found)
        client.goodbye()


def test_what_is_given_back_stays_given_back_though_nobody_waited_for_the_answer(daemon):
    """The daemon stood still, and reads RELEASE and whatever follows it in one go."""
    client = attach(daemon.address)
    rows, _ = client.reserve(0, 4, 60.0)
    stands, may_go_on = threading.Event(), threading.Event()
    daemon.loop.call_soon_threadsafe(lambda: (stands.set(), may_go_on.wait(60)))
    assert stands.wait(60)
    reply = client.connection.begin(m.Release(client.epoch, client.store, 0, rows.astype("<i4").tobytes()), m.Done)
    with pytest.raises(TierUnavailableError, match="did not answer"):
        reply.result(SOON_S)
    may_go_on.set()
    wait_for(lambda: daemon.store.pinned_slots() == 0)
    client.goodbye()


def test_a_block_larger_than_all_that_may_be_in_flight_comes_in(tmp_path):
    layout = KVLayout(num_layers=2, num_kv_heads=8, head_dim=128, block_size=128, dtype="float32")
    with InsideDaemon(tmp_path, host_bytes=8 * layout.block_bytes) as daemon:
        daemon.service.bytes_in_flight = layout.block_bytes // 2
        client = Attachment.open(daemon.address, [layout], "large", {}, Greeting("test", features=[m.BYTES]))
        rows, _ = client.reserve(0, 2, 60.0)
        blocks = np.random.default_rng(0).integers(0, 256, (2, layout.block_bytes), np.uint8)
        client.write_rows(0, rows[:2], blocks, np.arange(len(rows)))
        assert (daemon.store.core.groups[0].slab.rows[rows] == blocks).all()
        client.release(0, rows)
        client.goodbye()


def test_who_comes_back_before_its_old_socket_is_missed_holds_nothing_of_it(daemon):
    client = attach(daemon.address)
    client.reserve(0, 4, 60.0)
    put(client, [1])
    (connection,) = daemon.service._connections
    daemon.loop.call_soon_threadsafe(connection._transport.pause_reading)  # so that its end goes unseen
    again = attach(daemon.address, previous_boot=client.connection.welcome.boot, previous_epoch=client.epoch)
    wait_for(lambda: daemon.store.pinned_slots() == 0 and len(daemon.store.clients) == 1)
    again.goodbye()
    client.connection.close()
