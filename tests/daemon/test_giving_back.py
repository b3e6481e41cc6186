"""When slots are given back: once per lease, never with bytes under way into them, and not later than they have to be."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.client.asynchronous import AsyncDaemonConnection
from kvtier.pager.client.connection import Greeting
from kvtier.pager.daemon import attached
from kvtier.pager.wire import messages as m
from kvtier.tiers.errors import KvTierError

from .inside import InsideDaemon
from .raw import SIZE, attach, block, get, key, put
from .running import wait_for
from .test_hazards import TwoTenants

SLOTS = 8
FORKS_IN_A_WRITE = """
import os, socket, struct, sys
sys.path.insert(0, {tests!r})
from daemon.raw import LAYOUT, SIZE
from kvtier.pager.wire import messages as m
from kvtier.pager.wire.frames import HEADER, pack, pack_raw, unpack
peer = socket.socket(socket.AF_UNIX)
peer.connect({path!r})
def reply():
    (size,) = HEADER.unpack(peer.recv(HEADER.size, socket.MSG_WAITALL))[:1]
    return unpack(peer.recv(size, socket.MSG_WAITALL))
def call(number, message):
    peer.sendall(pack(message.KIND, number, m.to_fields(message)))
    return reply()
epoch = call(1, m.Hello(1, 2, ["bytes"], "forks", "two"))["epoch"]
store = call(2, m.Open([LAYOUT.to_dict()], "raw", want_slab=False))["store"]
slot = int.from_bytes(call(3, m.Reserve(epoch, store, 0, 1))["slots"], "little")
write = m.Write(epoch, store, 0, slot)
peer.sendall(pack_raw(write.KIND, 4, m.to_fields(write), SIZE) + b"E" * 8)
if os.fork():
    os._exit(0)
print("forked", flush=True)
input()
try:
    peer.sendall(b"E" * (SIZE - 8))
    reply()
except (OSError, struct.error):
    pass  # refused, or the end of what comes back
print("sent", flush=True)
"""


def bytes_daemon(tmp_path) -> InsideDaemon:
    return InsideDaemon(tmp_path, host_bytes=SLOTS * SIZE, tenants=TwoTenants(maps_slab=False))


def flags_of_release(client, rows) -> list[int]:
    message = m.Release(client.epoch, client.store, 0, np.asarray(rows, "<u4").tobytes())
    return list(client.connection.call(message, m.Done).flags)


def read(client, row: int) -> np.ndarray:
    found = np.empty((1, SIZE), np.uint8)
    client.read_rows(0, np.array([row]), found, np.zeros(1, np.int64))
    return found[0]


# ---------------------------------------------------------------------- as often as they were taken
def test_a_key_that_is_leased_twice_in_one_request_is_held_until_both_leases_end(tmp_path):
    with bytes_daemon(tmp_path) as daemon:
        one, two = attach(daemon.address, token="one"), attach(daemon.address, token="two")
        put(two, [1], "two")
        rows, _ = two.lease(0, key(1) + key(1), 60.0)
        assert rows[0] == rows[1]
        two.release(0, rows[:1])
        daemon.store.check_integrity()
        for number in range(10, 10 + 3 * SLOTS):  # somebody else's blocks go through every slot that is free
            put(one, [number], "one")
        assert (read(two, rows[0]) == block(1)).all()
        two.release(0, rows[:1])
        daemon.store.check_integrity()
        assert daemon.store.pinned_slots() == 0
        leased, _ = one.lease(0, key(10 + 3 * SLOTS - 1), 60.0)
        assert flags_of_release(two, rows) == [0, 0] and daemon.store.pinned_slots() == 1
        assert flags_of_release(one, leased) == [1]
        for client in (one, two):
            client.goodbye()


def test_a_release_ends_as_many_leases_as_it_names_and_says_so(tmp_path):
    with bytes_daemon(tmp_path) as daemon:
        client = attach(daemon.address, token="one")
        put(client, [1], "one")
        rows, _ = client.lease(0, key(1) * 3, 60.0)
        assert flags_of_release(client, rows[:2]) == [1, 1]
        assert daemon.store.pinned_slots() == 1
        assert flags_of_release(client, [*rows[:2], *rows[:2]]) == [1, 0, 0, 0]
        assert daemon.store.pinned_slots() == 0
        mine, _ = client.reserve(0, 2, 60.0)
        assert flags_of_release(client, [mine[0], mine[1], mine[0]]) == [1, 1, 0]
        daemon.store.check_integrity()
        assert daemon.store.pinned_slots() == 0
        client.goodbye()


# ---------------------------------------------------------------------- not while bytes are under way into them
def test_what_a_child_of_a_dead_client_goes_on_sending_reaches_no_slot(tmp_path):
    """The socket lives on in the child; the process that the slot belonged to is gone, and somebody else has it."""
    tests = str(Path(__file__).resolve().parent.parent)
    with bytes_daemon(tmp_path) as daemon:
        code = FORKS_IN_A_WRITE.format(tests=tests, path=daemon.address.removeprefix("unix://"))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "forked\n"
        assert process.wait(60) == 0  # the child goes on
        wait_for(lambda: not len(daemon.service.processes))
        client = attach(daemon.address, token="one")
        numbers = range(1, SLOTS + 1)
        for number in numbers:
            put(client, [number], "one")
        process.stdin.write("\n")
        process.stdin.close()
        assert "sent\n" in process.stdout.readlines()
        assert all((get(client, number) == block(number)).all() for number in numbers)
        assert daemon.service.attachments.by_connection.keys() == daemon.service._connections.keys()
        process.stdout.close()
        client.goodbye()


# ---------------------------------------------------------------------- and then at once
def test_who_was_given_no_memory_keeps_nothing_behind_its_socket(tmp_path):
    """Copies of its own cannot be under way. The process lives on, as this one does."""
    with bytes_daemon(tmp_path) as daemon:
        for number in range(3):
            client = attach(daemon.address, token="one")
            put(client, [number], "one", keep=True)
            client.connection.close()
        wait_for(lambda: not len(daemon.service.processes) and not daemon.store.clients)
        assert not daemon.service.attachments.left
        assert daemon.store.pinned_slots() == 0


def test_the_async_client_says_goodbye(tmp_path):
    async def come_and_go() -> None:
        connection = await AsyncDaemonConnection.open(daemon.address, Greeting("test", "one"))
        await connection.close()

    with bytes_daemon(tmp_path) as daemon:
        heard, goodbye = [], daemon.service._by_kind[m.Goodbye.KIND]
        daemon.service._by_kind[m.Goodbye.KIND] = lambda who, *given: (heard.append(who.epoch), goodbye(who, *given))[1]
        asyncio.run(come_and_go())
        wait_for(lambda: heard and not len(daemon.service.processes))


def test_a_process_leaves_only_so_many_attachments_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(attached, "MAX_LEFT", 2)
    with InsideDaemon(tmp_path, host_bytes=SLOTS * SIZE) as daemon:
        for number in range(2):
            last = attach(daemon.address)
            last.connection.close()
            wait_for(lambda number=number: len(daemon.service.attachments.left) == number + 1)
        with pytest.raises(KvTierError, match="ended without GOODBYE"):
            attach(daemon.address)
        assert len(daemon.service.processes) == 2
        welcome = last.connection.welcome
        again = attach(daemon.address, previous_boot=welcome.boot, previous_epoch=welcome.epoch)
        assert len(daemon.service.attachments.left) == 1
        again.goodbye()
