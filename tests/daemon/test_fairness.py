"""One tenant's waiting, slow reading or flooding is in no other tenant's way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.pager.daemon import connection, request_room
from kvtier.pager.daemon.keeping import Keeper
from kvtier.pager.daemon.settings import Limits
from kvtier.pager.daemon.tenants import Tenant
from kvtier.pager.daemon.threads import AT_ONCE
from kvtier.pager.keys import owner_tag
from kvtier.pager.wire import messages as m
from kvtier.pager.wire.frames import HEADER, pack, unpack
from kvtier.tiers.layout import KVLayout

from .inside import InsideDaemon
from .raw import LAYOUT, SIZE, key, put
from .running import START_S, wait_for

READERS = 14  # each leaves less unread than it is dropped for, all together more than there is room for

ALICE, BOB = Greeting("alice", "alice", ("bytes",)), Greeting("bob", "bob", ("bytes",))


class TwoTenants:
    """By token."""

    def find(self, uid, token, gids=()):
        return Tenant(token, {token: b"s" * 32}, maps_slab=False) if token in ("alice", "bob") else None


@pytest.fixture
def daemon(tmp_path) -> Iterator[InsideDaemon]:
    options = {"host_bytes": 64 * SIZE, "nvme_path": tmp_path / "nvme", "nvme_bytes": 4 << 20}
    with InsideDaemon(tmp_path, tenants=TwoTenants(), **options) as running:
        yield running


def open_model(daemon: InsideDaemon, greeting: Greeting, fingerprint: str = "m") -> Attachment:
    return Attachment.open(daemon.address, [LAYOUT], fingerprint, {}, greeting)


# ---------------------------------------------------------------------- threads
def test_flushes_that_wait_are_in_the_way_of_no_other_tenant_nor_of_other_requests(daemon, monkeypatch):
    hers, his = open_model(daemon, ALICE), open_model(daemon, BOB)
    gate, flush = threading.Event(), Keeper.flush

    def wait_for_room(self, client, timeout_s, *blocks):
        assert client.tenant.name != "alice" or gate.wait(START_S)
        flush(self, client, timeout_s, *blocks)

    monkeypatch.setattr(Keeper, "flush", wait_for_room)
    waiting = [hers.connection.begin(m.Flush(hers.epoch, hers.store, 60_000), m.Flushed) for _ in range(2 * AT_ONCE)]
    try:
        wait_for(lambda: len(daemon.service.threads) == len(waiting))
        put(his, [1], "bob")
        his.flush(START_S)
        another, same = open_model(daemon, BOB), open_model(daemon, ALICE)
        assert not any(reply.is_over for reply in waiting)
    finally:
        gate.set()
    for reply in waiting:
        reply.result(START_S)
    assert not len(daemon.service.threads)
    for client in (hers, his, another, same):
        client.goodbye()


# ---------------------------------------------------------------------- blocks over the socket
def test_replies_that_a_tenant_leaves_unread_are_in_the_way_of_its_own_blocks_alone(tmp_path):
    """And its own go on once somebody has read or is gone."""
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=64, block_size=512, dtype="float32", name="large")
    size = layout.block_bytes
    with InsideDaemon(tmp_path, tenants=TwoTenants(), host_bytes=16 * size) as daemon:
        opened = {one: Attachment.open(daemon.address, [layout], "m", {}, one) for one in (ALICE, BOB)}
        slots = {}
        for one, client in opened.items():
            slots[one], _ = client.reserve(0, 1, START_S)
            words = np.full(1, 512, "<u4").tobytes(), np.full(1, owner_tag(one.name), "<u4").tobytes()
            at = slots[one].astype("<i4").tobytes()
            key = one.name.encode().ljust(32)
            commit = m.Commit(client.epoch, client.store, 0, at, key, bytes(32), *words, False)
            assert client.connection.call(commit, m.Committed).results == b"\x01"
        unread = [SilentReader(daemon, layout, b"alice".ljust(32)) for _ in range(READERS)]
        wait_for(lambda: daemon.service._blocks._unsent.get("alice"))
        into = np.empty((1, size), np.uint8)
        opened[BOB].read_rows(0, slots[BOB], into, np.zeros(1, np.int64))
        assert daemon.service._blocks._unsent["alice"]  # still
        for reader in unread:
            reader.close()
        opened[ALICE].read_rows(0, slots[ALICE], into, np.zeros(1, np.int64))
        assert not daemon.service._blocks._unsent
        for client in opened.values():
            client.goodbye()


# ---------------------------------------------------------------------- connections
class Users:
    """Who the kernel says is at the other end, in place of ourselves."""

    kernel, uid = connection._PEER, 1
    size = kernel.size

    def unpack(self, raw: bytes) -> tuple[int, int, int]:
        pid, _, gid = self.kernel.unpack(raw)
        return pid, self.uid, gid


def test_connections_of_one_user_leave_some_to_the_others(daemon, monkeypatch):
    users = Users()
    monkeypatch.setattr(connection, "_PEER", users)
    daemon.service.limits = Limits(connections=16, hello_s=600)
    strangers = [dial(daemon) for _ in range(14)]
    wait_for(lambda: len(daemon.service._connections) == len(strangers))
    with dial(daemon) as one_more:
        assert b"14 connections are open, 14 of them from here" in all_of(one_more)
    users.uid = 2
    open_model(daemon, BOB).goodbye()
    strangers.pop().close()
    wait_for(lambda: len(daemon.service._connections) == len(strangers))
    users.uid = 1
    open_model(daemon, ALICE).goodbye()
    for stranger in strangers:
        stranger.close()


def test_who_says_nothing_is_shown_out_and_who_has_said_hello_stays(daemon):
    his = open_model(daemon, BOB)
    daemon.service.limits = Limits(hello_s=1)
    with dial(daemon) as stranger:
        stranger.sendall(b"\x01")  # no more of it than that
        assert b"no HELLO within 1 s" in all_of(stranger)
    put(his, [1], "bob")
    his.goodbye()


def dial(daemon: InsideDaemon) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(START_S)
    raw.connect(daemon.address.removeprefix("unix://"))
    return raw


def all_of(raw: socket.socket) -> bytes:
    """What it is told until it is closed."""
    return b"".join(iter(lambda: raw.recv(1 << 16), b""))


# ---------------------------------------------------------------------- room for requests
def test_requests_that_are_never_ended_take_a_bounded_memory_and_no_other_tenants(daemon, monkeypatch):
    frame_bytes, bound = 1 << 20, 5 << 20
    monkeypatch.setattr(request_room, "MAX_BYTES", bound)
    his = open_model(daemon, BOB)
    hers = [dial(daemon) for _ in range(8)]
    for raw in hers:
        hello(raw, "alice")
        raw.sendall(HEADER.pack(frame_bytes, 1, m.Lookup.KIND, 0, 2) + bytes(1 << 17))
    here = daemon.service.attachments.by_connection
    wait_for(lambda: sum(one._is_let_in or one._is_held_up for one in list(here)) == len(hers))
    assert sum(one._is_let_in for one in here) == 2  # of half of the bound
    assert sum(one.buffer_bytes for one in here) <= bound // 2
    assert not his.lookup([key(number) for number in range(30_000)], prefix=False, hold=False).any()
    pairs = list(zip(hers, [one for one, who in here.items() if who.tenant.name == "alice"], strict=True))
    for raw, one in pairs:
        if one._is_let_in:
            raw.close()
    waiting = [(raw, one) for raw, one in pairs if raw.fileno() >= 0]
    while waiting:  # those that were held up have their turn
        wait_for(lambda: any(one._is_let_in for _, one in waiting))
        raw, one = next((raw, one) for raw, one in waiting if one._is_let_in)
        with raw:
            raw.sendall(bytes(frame_bytes - (1 << 17)))
            assert "not msgpack" in heard(raw)["message"]
        waiting.remove((raw, one))
    his.goodbye()


def hello(raw: socket.socket, tenant: str) -> dict:
    return ask(raw, m.Hello(1, 2, ["bytes"], "", tenant))


def ask(raw: socket.socket, message) -> dict:
    raw.sendall(pack(message.KIND, 1, m.to_fields(message)))
    return heard(raw)


def heard(raw: socket.socket) -> dict:
    """The next reply."""
    size = HEADER.unpack(raw.recv(HEADER.size, socket.MSG_WAITALL))[0]
    return unpack(raw.recv(size, socket.MSG_WAITALL))


class SilentReader:
    """Asks for one block of Alice's and reads nothing of it."""

    def __init__(self, daemon: InsideDaemon, layout: KVLayout, key: bytes) -> None:
        self._raw = dial(daemon)
        epoch = hello(self._raw, "alice")["epoch"]
        store = ask(self._raw, m.Open([layout.to_dict()], "m", {}, False))["store"]
        read = m.Read(epoch, store, 0, ask(self._raw, m.Lease(epoch, store, 0, key))["slots"])
        self._raw.sendall(pack(m.Read.KIND, 1, m.to_fields(read)))

    def close(self) -> None:
        self._raw.close()
