"""Answers that come after their time: what they give is not lost, and GOODBYE is not taken back."""

from __future__ import annotations

import threading

import pytest

from kvtier.pager.wire import messages as m
from kvtier.tiers.errors import TierUnavailableError

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
