"""One tenant's waiting, slow reading or flooding is in no other tenant's way."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.pager.daemon.keeping import Keeper
from kvtier.pager.daemon.tenants import Tenant
from kvtier.pager.daemon.threads import AT_ONCE
from kvtier.pager.wire import messages as m

from .inside import InsideDaemon
from .raw import LAYOUT, SIZE, put
from .running import START_S, wait_for

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

    def wait_for_room(self, client, timeout_s):
        assert client.tenant.name != "alice" or gate.wait(START_S)
        flush(self, client, timeout_s)

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
