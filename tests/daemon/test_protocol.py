"""The protocol itself: versions both ways, limits, bad frames, cancellation, fair turns, both clients."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from functools import partial

import numpy as np
import pytest

from kvtier.pager.client.asynchronous import AsyncDaemonConnection
from kvtier.pager.client.connection import DaemonConnection, Greeting
from kvtier.pager.daemon.settings import Limits
from kvtier.pager.daemon.turns import Turns
from kvtier.pager.protocol import fetch_status
from kvtier.pager.wire import messages as m
from kvtier.pager.wire.frames import HEADER, MAX_DEPTH, pack, unpack
from kvtier.tiers.cpu import CpuBackend, HostEvent
from kvtier.tiers.errors import KvTierError, ProtocolError, TierUnavailableError
from kvtier.tiers.streams import AllDone

from ..pager.harness import Rig
from .inside import InsideDaemon
from .raw import SIZE, WAIT_S, attach, block, get, key, put
from .running import wait_for


@pytest.fixture
def daemon(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=64 * SIZE, nvme_path=tmp_path / "nvme", nvme_bytes=4 << 20) as running:
        yield running


# ---------------------------------------------------------------------- versions
@pytest.mark.parametrize(("server", "client"), [(2, 1), (1, 2), (1, 1)])
def test_this_version_and_the_one_before_work_together(tmp_path, server, client):
    with InsideDaemon(tmp_path, host_bytes=64 * SIZE, version=server) as running:
        raw = attach(running.address, newest_version=client)
        assert raw.version == 1
        put(raw, [1, 2])
        found = raw.lookup([key(1), key(2), key(3)], prefix=True, hold=True)
        assert (found & 3 > 0).all() and found.shape == (1, 2) and (found & 4 > 0).all()
        assert (get(raw, 2) == block(2)).all()
        assert running.store.core.groups[0].directory.refs.sum() == 2
        raw.goodbye()
        assert running.store.core.groups[0].directory.refs.sum() == 0


def test_pagers_of_two_versions_share(tmp_path, monkeypatch):
    with InsideDaemon(tmp_path, host_bytes=1 << 20, version=1) as running:
        first, second = (Rig(daemon=running.address, backend=CpuBackend(poison=True), pages=32) for _ in range(2))
        tokens = list(range(100, 140))
        first.prefill(first.start(tokens))
        wait_for(lambda: (first.pager.poll(), second.pager.match(tokens).tokens == len(tokens))[1])
        second.say(second.start(tokens), [1, 2])
        assert not first.wrong and not second.wrong
        first.close()
        second.close()


def test_versions_without_a_common_one_are_refused_with_both_named(daemon):
    with pytest.raises(ProtocolError, match="speaks 1 to 2, the client 7 to 9"):
        DaemonConnection.open(daemon.address, Greeting(oldest_version=7, newest_version=9))


def test_unknown_fields_are_ignored_and_unknown_messages_answered(daemon):
    connection = DaemonConnection.open(daemon.address, timeout_s=WAIT_S)
    frame = pack(99, 7, {"x": 1})
    with connection._sending:
        connection._transport.send(memoryview(frame))
    with pytest.raises(ProtocolError, match=r"Lookup\.store is a str"):
        connection.call(m.Lookup("one", b""), m.Found, timeout_s=WAIT_S)  # type: ignore[arg-type]
    fields = m.to_fields(m.Hello(1, 2, [])) | {"from_the_future": [1]}
    assert m.from_fields(m.Hello, fields) == m.Hello(1, 2, [])
    with pytest.raises(ProtocolError, match="store 5 is not open"):
        connection.call(m.Lookup(5, b""), m.Found, timeout_s=WAIT_S)
    connection.close()


# ---------------------------------------------------------------------- limits and bad input
def raw_socket(address: str) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.connect(address.removeprefix("unix://"))
    return raw


def refused(daemon, data: bytes, *, greet: bool = True) -> str:
    """What the daemon says to that before it closes; empty when it only closes."""
    raw = raw_socket(daemon.address)
    raw.settimeout(60.0)
    if greet:
        raw.sendall(pack(m.Hello.KIND, 1, m.to_fields(m.Hello(1, 2, []))))
        size = HEADER.unpack(raw.recv(HEADER.size, socket.MSG_WAITALL))[0]
        raw.recv(size, socket.MSG_WAITALL)
    raw.sendall(data)
    head = raw.recv(HEADER.size, socket.MSG_WAITALL)
    if len(head) < HEADER.size:
        return ""
    size, _, kind, _, request_id = HEADER.unpack(head)
    said = unpack(raw.recv(size, socket.MSG_WAITALL))
    assert kind == m.ERROR and request_id == 0 and raw.recv(1) == b""
    raw.close()
    return str(said["message"])


@pytest.mark.parametrize(
    ("frame", "greet", "word"),
    [
        (HEADER.pack(5000, 1, m.Hello.KIND, 0, 1), False, "limit is 4096"),
        (HEADER.pack(9 << 20, 1, m.Lookup.KIND, 0, 1), True, "limit is 8388608"),
        (HEADER.pack(1 << 31, 1, m.Write.KIND, 1, 1), True, "limit is 67108864"),
        (HEADER.pack(0, 9, m.Lookup.KIND, 0, 1), True, "frame version 9"),
        (HEADER.pack(0, 1, m.Lookup.KIND, 6, 1), True, "frame flags 0x6"),
        (pack(m.Lookup.KIND, 1, {}), False, "before HELLO"),
        (HEADER.pack(8, 1, m.Write.KIND, 1, 1) + struct.pack("<I", 900) + bytes(4), True, "announces a map of 900"),
        (HEADER.pack(1, 1, m.Hello.KIND, 0, 1) + b"\xc1", False, "not msgpack"),
    ],
)
def test_a_frame_that_breaks_the_rules_ends_the_connection_with_a_reason(daemon, frame, greet, word):
    assert word in refused(daemon, frame, greet=greet)
    attach(daemon.address).goodbye()  # others are served


def test_bodies_are_checked():
    deep: object = 1
    for _ in range(MAX_DEPTH + 1):
        deep = {"x": deep}
    with pytest.raises(ProtocolError, match="nested deeper"):
        unpack(pack(1, 1, deep)[HEADER.size :])  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="twice"):
        unpack(b"\x82\xa1x\x01\xa1x\x02")
    with pytest.raises(ProtocolError, match="not a map"):
        unpack(b"\x90")


def test_random_bytes_harm_nobody(daemon, seed):
    choose, witness = random.Random(seed), attach(daemon.address)
    put(witness, [1])
    valid = [pack(kind, 5, m.to_fields(m.Release(1, 1, 0, b"\x01\0\0\0"))) for kind in m.REQUEST_BY_KIND]
    for number in range(150):
        raw = raw_socket(daemon.address)
        raw.settimeout(0.2)
        data = bytearray(choose.choice(valid)) if choose.random() < 0.7 else bytearray(choose.randbytes(40))
        for _ in range(choose.randrange(4)):
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        try:
            if choose.random() < 0.8:
                raw.sendall(pack(m.Hello.KIND, 1, m.to_fields(m.Hello(1, 2, []))))
            raw.sendall(bytes(data))
            if number % 3 == 0:
                raw.recv(4096)
        except (OSError, TimeoutError):
            pass
        raw.close()
    assert (get(witness, 1) == block(1)).all()
    daemon.store.check_integrity()
    witness.goodbye()


def test_slots_and_groups_out_of_range_are_refused(daemon):
    client = attach(daemon.address)
    for call, word in (
        (lambda: client.release(0, np.array([1 << 20])), "layer group 0 has 64"),
        (lambda: client.release(3, np.array([0])), "layer group 3"),
        (lambda: client.hold(0, b"short"), "multiple of 32"),
        (lambda: client.write_rows(0, np.array([5]), block(1)[None], np.zeros(1, np.int64)), "not reserved"),
    ):
        with pytest.raises(ProtocolError, match=word):
            call()
    assert not client.is_lost
    client.goodbye()


def test_a_peer_that_sends_without_reading_is_held_back(daemon):
    raw = raw_socket(daemon.address)
    raw.sendall(pack(m.Hello.KIND, 1, m.to_fields(m.Hello(1, 2, []))))
    wait_for(lambda: daemon.service.attachments.by_connection)
    (connection,) = daemon.service.attachments.by_connection
    raw.settimeout(0.5)
    late = m.to_fields(m.Release(1 << 30, 0, 0, b""))
    with pytest.raises(TimeoutError):
        for request in range(2, 1 << 20):
            raw.sendall(pack(m.Release.KIND, request, late))  # the refusal is longer than most answers
    assert len(connection._in_flight) <= 2 * Limits().requests_in_flight
    raw.close()


# ---------------------------------------------------------------------- waiting and turns
def test_a_large_request_leaves_no_large_buffer_behind(daemon):
    raw = attach(daemon.address)
    keys = [key(number) for number in range(8192)]
    for _ in range(2):
        assert raw.lookup(keys, prefix=False, hold=False).shape == (1, len(keys))
    wait_for(lambda: {len(connection._buffer) for connection in daemon.service._connections} == {1 << 16})
    put(raw, [1])
    assert raw.lookup(keys, prefix=False, hold=False)[0].tolist().index(1) == 1
    raw.goodbye()


def reads_wait(daemon, client) -> HostEvent:
    """Block 1 is on nvme alone, and what is read from there comes once the event is finished."""
    put(client, [1])
    client.flush(WAIT_S)
    client.unhold(0, key(1))
    for number in range(100, 200):
        put(client, [number])
        client.unhold(0, key(number))
    store = daemon.store
    wait_for(lambda: store.lookup(next(iter(store.clients)), [key(1)], prefix=True, hold=False)[0, 0] == m.ON_DISK)
    slow, disk = HostEvent(), store.core.nvme.read

    def read_late(*arguments):
        ticket = disk(*arguments)
        ticket.event = AllDone([*ticket.event._events, slow])
        return ticket

    store.core.nvme.read = read_late
    return slow


def test_a_cancelled_lease_gives_its_slots_and_its_place_back(daemon):
    client, other = attach(daemon.address), attach(daemon.address)
    slow, store = reads_wait(daemon, client), daemon.store
    message = m.Lease(other.epoch, other.store, 0, key(1), 60_000)
    with pytest.raises(TierUnavailableError, match="did not answer"):
        other.connection.call(message, m.Leased, timeout_s=0.3)
    wait_for(lambda: not daemon.service.verbs.waiting and not any(c.requests for c in store.clients))
    wait_for(lambda: not any(connection._in_flight for connection in daemon.service._connections))
    slow.finish()
    wait_for(lambda: not store.core.in_flight())
    store.check_integrity()
    assert store.pinned_slots() == 0
    assert (get(other, 1) == block(1)).all()
    for one in (client, other):
        one.goodbye()


def test_a_lease_that_waits_ends_with_its_socket(daemon):
    """Nobody was told of its slots, so no copy runs from them, though the process lives on."""
    client, other = attach(daemon.address), attach(daemon.address)
    slow, store = reads_wait(daemon, client), daemon.store
    other.connection.begin(m.Lease(other.epoch, other.store, 0, key(1), 60_000), m.Leased)
    wait_for(lambda: daemon.service.verbs.waiting)
    other.connection.close()
    wait_for(lambda: daemon.service.attachments.left and not daemon.service.verbs.waiting)
    slow.finish()
    wait_for(lambda: not store.core.in_flight())
    store.check_integrity()
    assert store.pinned_slots() == 0 and not any(c.requests for c in store.clients)
    client.goodbye()


def test_turns_go_round():
    loop = asyncio.new_event_loop()
    served: list[str] = []
    turns = Turns(loop, clock=lambda: 0.0)
    for i in range(5):
        turns.put("flood", lambda i=i: served.append(f"flood {i}"))
    turns.put("quiet", lambda: served.append("quiet 0"))
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    assert served[:3] == ["flood 0", "quiet 0", "flood 1"] and len(served) == 6


# ---------------------------------------------------------------------- clients
def test_one_blocking_connection_serves_many_threads(daemon):
    client = attach(daemon.address)
    put(client, list(range(8)))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(30):
                assert (get(client, number) == block(number)).all()
                assert client.lookup([key(number)], prefix=True, hold=False).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    client.goodbye()


def test_the_async_client_speaks_the_same(daemon):
    client = attach(daemon.address)
    put(client, [1, 2, 3])

    async def ask() -> list[int]:
        connection = await AsyncDaemonConnection.open(daemon.address, timeout_s=WAIT_S)
        call = partial(connection.call, timeout_s=WAIT_S)
        from .raw import LAYOUT

        opened = await call(m.Open([LAYOUT.to_dict()], "raw", {}, False), m.Opened)
        keys = b"".join(map(key, (1, 2, 3, 4)))
        found = await asyncio.gather(*(call(m.Lookup(opened.store, keys), m.Found) for _ in range(20)))
        with pytest.raises(ProtocolError, match="store 9 is not open"):
            await call(m.Lookup(9, b""), m.Found)
        await connection.close()
        with pytest.raises(KvTierError):
            await connection.call(m.Lookup(1, b""), m.Found)
        return [reply.num_keys for reply in found]

    assert asyncio.run(ask()) == [3] * 20
    client.goodbye()


def test_whoever_waits_hears_at_once_that_the_daemon_went(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=64 * SIZE) as running:
        client = attach(running.address)
        asked, heard = threading.Event(), list[float]()
        running.service.turns.put = lambda *_: asked.set()  # it answers nothing more

        def ask() -> None:
            started_s = time.monotonic()
            with pytest.raises(TierUnavailableError, match="gone"):
                client.connection.call(m.Lookup(client.store, b""), m.Found, timeout_s=120.0)
            heard.append(time.monotonic() - started_s)

        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(60)
        (connection,) = running.service.attachments.by_connection
        running.loop.call_soon_threadsafe(connection.close)
        thread.join(60)
        assert heard and heard[0] < 60.0


def test_status_needs_no_hello(daemon):
    client = attach(daemon.address)
    put(client, [1], keep=True)
    status = fetch_status(daemon.address, 60.0)
    assert status["daemon"]["connections"] == 1 and status["daemon"]["pinned_slots"] == 1
    assert status["tiers"]["host"]["blocks"] == 1
    client.goodbye()


def test_who_breaks_does_not_keep_the_others_waiting():
    loop = asyncio.new_event_loop()
    turns, served = Turns(loop), []
    loop.set_exception_handler(lambda *_: None)

    def broken() -> None:
        raise BrokenPipeError

    for work in (broken, lambda: served.append(1)):
        turns.put("a", work)
    loop.call_later(0.05, loop.stop)
    loop.run_forever()
    loop.close()
    assert served == [1]
