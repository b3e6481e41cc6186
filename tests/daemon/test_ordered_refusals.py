"""What a daemon that copies for its clients refuses: pages and slots that are not theirs, pools that are not what they say."""

from __future__ import annotations

import os
import socket

import pytest

from kvtier.pager.wire import messages as m
from kvtier.tiers.errors import Busy, ConfigError, ProtocolError
from kvtier.tiers.exported import ExportedRows
from kvtier.tiers.shared import make_rows

from .gated import Gate, serving
from .ordering import PAGES, Ordering
from .raw import SIZE, attach, block, put, stamps


def test_the_daemon_checks_every_page_and_every_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(m, "MAX_COPY_BYTES", 4 * SIZE)
    with serving(tmp_path) as daemon:
        client, other = Ordering(daemon.address), attach(daemon.address)
        theirs, _ = other.reserve(0, 1, 60.0)
        leased, (mine, *_) = put(client.attachment, [1], keep=True), client.attachment.reserve(0, 1, 60.0)[0]
        cases = [
            (client.copy_message([PAGES + 1], leased), "page 9; the pool has 8"),
            (client.copy_message([0], [10_000]), "slot 10000"),
            (client.copy_message([0], theirs), "not leased by this client"),
            (client.copy_message([0], theirs, is_write_back=True), "not reserved by this client"),
            (client.copy_message([0], leased, is_write_back=True), "not reserved by this client"),
            (client.copy_message([0, 1], leased), "2 pages and 1 slots"),
            (client.copy_message([], []), "0 pages and 0 slots"),
            (client.copy_message([0] * 5, [int(mine)] * 5), "5 blocks; at most"),
            (m.Settle(client.attachment.epoch), "this connection's own"),
            (m.Export(client.attachment.epoch), "a second time"),
        ]
        for message, said in cases:
            with pytest.raises(ProtocolError, match=said):
                client.say(message, m.Copied)
        assert not client.pool.rows.any() and not daemon.service.copies.num_orders
        assert (client.attachment.rows[0][leased[0]] == block(1)).all()
        other.goodbye()
        client.close()


@pytest.mark.parametrize(
    ("kind", "handle", "num_pages", "page_bytes", "said"),
    [
        ("memfd", b"", 1000, SIZE, "were announced"),
        ("memfd", b"", PAGES, SIZE // 2, "a block of layer group 0 has"),
        ("memfd", b"", 0, SIZE, "0 pages"),
        ("memfd", bytes(257), PAGES, SIZE, "257 bytes of handle"),
        ("vmm", b"", PAGES, SIZE, "kind 'vmm'"),
        ("cuda", bytes(64), PAGES, SIZE, "CuPy|cannot be opened"),
    ],
)
def test_a_pool_that_is_not_what_it_says_is_refused(tmp_path, kind, handle, num_pages, page_bytes, said):
    with serving(tmp_path) as daemon:
        client = Ordering(daemon.address, register=False)
        socket.send_fds(client.orders._channel, [b"p"], [client.pool.fd])
        where = client.attachment.epoch, client.attachment.store, 0
        with pytest.raises((ProtocolError, ConfigError), match=said):
            client.say(m.Register(*where, kind, handle, num_pages, page_bytes), m.Registered)
        with pytest.raises(ProtocolError, match="no pool; send REGISTER"):
            client.say(client.copy_message([0], [0]), m.Copied)
        client.close()


def test_memory_that_could_fault_under_the_daemon_is_refused(tmp_path):
    """A memfd that can shrink, or whose pages the daemon would be the first to touch, and be charged for."""
    with serving(tmp_path) as daemon:
        client = Ordering(daemon.address, register=False)
        unsealed = os.memfd_create("unsealed")
        os.posix_fallocate(unsealed, 0, (PAGES + 1) * SIZE)
        empty, fd = make_rows(PAGES + 1, max(SIZE, 4096), name="empty")
        for bad, said in ((unsealed, "seals"), (fd, "not all there")):
            rows = ExportedRows(client.pool.rows, client.pool.probe, "memfd", b"", bad)
            with pytest.raises(ConfigError, match=said):
                client.orders.register(0, rows)
            os.close(bad)
        where = client.attachment.epoch, client.attachment.store, 0
        with pytest.raises(ProtocolError, match="0 descriptors came"):
            client.say(m.Register(*where, "memfd", b"", PAGES, SIZE), m.Registered)
        client.orders.register(0, client.pool)
        with pytest.raises(ProtocolError, match="has a pool already"):
            client.orders.register(0, client.pool)
        client.close()
        del empty


def test_a_slot_whose_copy_runs_is_neither_released_nor_committed(tmp_path):
    with serving(tmp_path) as daemon:
        client = Ordering(daemon.address)
        leased, reserved = put(client.attachment, [1], keep=True), client.attachment.reserve(0, 1, 60.0)[0]
        gates = [Gate(daemon, name) for name in ("promote", "demote")]
        told = client.order([0], leased, is_write_back=False), client.order([1], reserved, is_write_back=True)
        for rows in (leased, reserved):
            with pytest.raises(ProtocolError, match="its COPY is not over"):
                client.attachment.release(0, rows)
        with pytest.raises(ProtocolError, match="its COPY is not over"):
            client.attachment.commit(0, reserved, stamps([5]), [b""])
        again, _ = client.attachment.lease(0, stamps([1])["key"].tobytes(), 60.0)
        client.attachment.release(0, again)  # one lease of two: the slot is still held
        assert not any(one.event.is_done() for one in told)  # (e): no answer before the copy stream has finished
        for gate in gates:
            gate.open()
        assert all(one.event.wait(60) and one.event.error is None for one in told)
        for rows in (leased, reserved):
            client.attachment.release(0, rows)
        client.close()


def test_too_many_copies_at_once_are_refused(tmp_path):
    with serving(tmp_path) as daemon:
        client = Ordering(daemon.address)
        leased, gate = put(client.attachment, [1], keep=True), Gate(daemon, "promote")
        told = [client.order([0], leased, is_write_back=False) for _ in range(m.MAX_COPIES)]
        with pytest.raises(Busy, match="under way"):
            client.say(client.copy_message([0], leased), m.Copied)
        gate.open()
        assert all(one.event.wait(60) and one.event.error is None for one in told)
        client.close()
