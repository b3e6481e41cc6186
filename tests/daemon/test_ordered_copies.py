"""transfer="ipc": the daemon copies between a client's pages and its slots. What it refuses, and every hazard between the two
processes; taking the guard out makes the test fail. A gate in the daemon's copy stream holds copies back as a test likes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.pager.client.ordered import Lane, OrderedStream
from kvtier.pager.rules import ALL_RULES, Rule, Rules
from kvtier.pager.states import PageState
from kvtier.pager.wire import messages as m
from kvtier.tiers.cpu import CpuBackend, HostEvent
from kvtier.tiers.errors import Busy, ConfigError, ProtocolError, TierUnavailableError
from kvtier.tiers.exported import ExportedRows
from kvtier.tiers.shared import make_rows

from ..pager.harness import LAYOUT as RIG_LAYOUT
from ..pager.harness import WINDOWED, Rig
from .inside import InsideDaemon
from .ordering import PAGES, Ordering, Told
from .raw import SIZE, attach, block, put, stamps
from .running import Pagerd, wait_for

TOKENS = list(range(100, 140))
DYING = """
import sys
sys.path.insert(0, {tests!r})
from daemon.ordering import Ordering
client = Ordering({address!r})
client.pool.rows[3] = 7
rows, _ = client.attachment.reserve(0, 1, 5.0)
client.order([3], rows, is_write_back=True)
print("ordered", rows[0], flush=True)
input()
"""


class Gate:
    """Holds a copy stream of the daemon: what is queued from now on waits until it opens."""

    def __init__(self, daemon: InsideDaemon, stream: str) -> None:
        self._event = threading.Event()
        self.stream = getattr(daemon.store.core.backend, stream)
        self.stream.run(self.wait)

    def wait(self) -> None:
        self._event.wait(60)

    def open(self) -> None:
        self._event.set()


def serving(tmp_path: Path, **options) -> InsideDaemon:
    options = {"host_bytes": 64 * SIZE, "allow_ipc": True} | options
    return InsideDaemon(tmp_path, **options)


def stored(daemon: InsideDaemon, tokens: list[int] = TOKENS, layouts=None) -> None:
    """What another engine, which copies by itself, has computed of these tokens."""
    rig = Rig(daemon=daemon.address, backend=CpuBackend(), pages=32, layouts=layouts)
    rig.prefill(rig.start(tokens))
    wait_for(lambda: all_in_daemon(rig))
    rig.close()


def all_in_daemon(rig: Rig) -> bool:
    rig.pager.poll()
    with rig.pager._core.lock:
        books = [group.directory for group in rig.pager._core.groups]
        return all(d.nvme_valid[d.is_named & d.is_live].all() for d in books)


def ordering_rig(address: str, **options) -> Rig:
    rig = Rig(daemon=address, backend=CpuBackend(poison=True), **({"pages": 32, "transfer": "ipc"} | options))
    assert copies_of(rig)["copies"] == "daemon", copies_of(rig)
    return rig


def copies_of(rig: Rig) -> dict:
    return rig.pager._core.nvme.status()


# ---------------------------------------------------------------------- what it does
@pytest.mark.parametrize("layouts", [[RIG_LAYOUT], [RIG_LAYOUT, WINDOWED]])
def test_blocks_travel_both_ways_and_no_copy_is_the_clients(tmp_path, layouts):
    with serving(tmp_path, host_bytes=256 * SIZE) as daemon:
        first, second = (ordering_rig(daemon.address, layouts=layouts) for _ in range(2))
        for rig in (first, second):
            for stream in (rig.backend.promote, rig.backend.demote):
                stream.copy_rows = None  # would fail
        first.prefill(first.start(TOKENS))
        wait_for(lambda: all_in_daemon(first))
        seq = second.start(TOKENS)
        assert second.pager.num_computed(seq) == len(TOKENS) // 4 * 4 - 4
        second.prefill(seq)
        for rig in (first, second):
            rig.settle()
            rig.pager.check_integrity()
            assert not rig.wrong
        assert second.pager.counters.get("moved_blocks") > 0
        for rig in (first, second):
            rig.close()
        wait_for(lambda: not daemon.service.attachments.by_connection)
        assert not daemon.service.attachments.ending and not daemon.store.pinned_slots()


def test_raw_copies_move_exactly_the_named_blocks(tmp_path):
    with serving(tmp_path) as daemon:
        client = Ordering(daemon.address)
        leased = put(client.attachment, [1, 2, 3], keep=True)
        told = client.order([5, 0, 2], leased, is_write_back=False)
        assert told.event.wait(60) and told.event.error is None
        for page, number in ((5, 1), (0, 2), (2, 3)):
            assert (client.pool.rows[page] == block(number)).all()
        assert not client.pool.rows[[1, 3, 4, 6, 7]].any()
        rows, _ = client.attachment.reserve(0, 2, 5.0)
        told = client.order([2, 5], rows, is_write_back=True)
        assert told.event.wait(60) and told.event.error is None
        assert (client.attachment.rows[0][rows[0]] == block(3)).all()
        results, _ = client.attachment.commit(0, rows[:1], stamps([9]), [b""])
        assert results[0] & 3 == 1
        client.close()


# ---------------------------------------------------------------------- what is refused
def test_the_daemon_checks_every_page_and_every_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(m, "MAX_COPY_BYTES", 4 * SIZE)
    with serving(tmp_path) as daemon:
        client, other = Ordering(daemon.address), attach(daemon.address)
        theirs, _ = other.reserve(0, 1, 5.0)
        leased, (mine, *_) = put(client.attachment, [1], keep=True), client.attachment.reserve(0, 1, 5.0)[0]
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
        leased, reserved = put(client.attachment, [1], keep=True), client.attachment.reserve(0, 1, 5.0)[0]
        gates = [Gate(daemon, name) for name in ("promote", "demote")]
        told = client.order([0], leased, is_write_back=False), client.order([1], reserved, is_write_back=True)
        for rows in (leased, reserved):
            with pytest.raises(ProtocolError, match="its COPY is not over"):
                client.attachment.release(0, rows)
        with pytest.raises(ProtocolError, match="its COPY is not over"):
            client.attachment.commit(0, reserved, stamps([5]), [b""])
        again, _ = client.attachment.lease(0, stamps([1])["key"].tobytes(), 5.0)
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


# ---------------------------------------------------------------------- the hazards
@pytest.mark.parametrize("broken", [False, True])
def test_a_dead_clients_slots_wait_for_the_copies_that_it_ordered(tmp_path, broken):
    """(a), rules 7 and 8: its process is gone, its memory and its slots are not, until the copy is over."""
    rules = Rules.without(Rule.DROP_HALF_DONE) if broken else ALL_RULES
    with serving(tmp_path, rules=rules) as daemon:
        keeper = attach(daemon.address)  # so that there is a store
        gate = Gate(daemon, "demote")
        code = DYING.format(tests=str(Path(__file__).resolve().parents[1]), address=daemon.address)
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        said, slot = process.stdout.readline().split()
        assert said == "ordered"
        wait_for(lambda: daemon.service.copies.num_orders == 1)
        process.kill()
        process.wait()
        wait_for(lambda: len(daemon.service.processes) == 1)  # the keeper
        assert daemon.store.pinned_slots() == (0 if broken else 1)
        assert len(daemon.service.attachments.ending) == (0 if broken else 1)
        gate.open()
        wait_for(lambda: not daemon.service.copies.num_orders and not daemon.store.pinned_slots())
        assert not daemon.service.attachments.ending
        assert (keeper.rows[0][int(slot)] == 7).all()  # what the dead client's page held: its memory was still there
        if not broken:
            daemon.store.check_integrity()
        keeper.goodbye()


@pytest.mark.parametrize("broken", [False, True])
def test_a_page_in_doubt_is_not_used_while_the_daemon_lives(tmp_path, broken):
    """(c), rule 5: the socket breaks in the middle of a copy-in, and the daemon writes into the page later all the same."""
    rules = Rules.without(Rule.COPY_IN_FLIGHT_IS_NOT_FREE) if broken else ALL_RULES
    with serving(tmp_path) as daemon:
        stored(daemon)
        rig = ordering_rig(daemon.address, rules=rules)
        gate = Gate(daemon, "promote")
        seq, pages = rig.start(TOKENS), rig.pager._core.groups[0].pages
        while not (pages.state == PageState.FILLING).any():
            with pytest.raises(Busy):
                rig.step([(seq, 1)], timeout_s=0.05)
        filling = np.flatnonzero(pages.state == PageState.FILLING)
        wait_for(lambda: daemon.service.copies.num_orders > 0)
        break_sockets(daemon)
        if broken:
            wait_for(lambda: not (pages.state == PageState.FILLING).any())
        else:
            wait_for(lambda: copies_of(rig)["copies_in_doubt"] > 0 and copies_of(rig)["copies"] == "client")
            assert (pages.state[filling] == PageState.FILLING).all()
        rig.pager.release(seq)
        other = rig.start(list(range(500, 540)))
        rig.prefill(other)
        gate.open()
        wait_for(lambda: not daemon.service.copies.num_orders)
        wait_for(lambda: copies_of(rig)["copies_in_doubt"] == 0)
        rig.say(other, [7])  # reads all of it again
        rig.settle()
        assert bool(rig.wrong) == broken
        if not broken:
            wait_for(lambda: copies_of(rig)["copies"] == "daemon")  # attached again
            rig.pager.check_integrity()
            again = rig.start(TOKENS)
            rig.prefill(again)
            assert not rig.wrong
        rig.close()


def break_sockets(daemon: InsideDaemon) -> None:
    """As a network or a bug would: no word, and both processes live on."""
    for connection in list(daemon.service.attachments.by_connection):
        daemon.loop.call_soon_threadsafe(connection.close)


def test_pages_in_doubt_come_back_when_the_daemon_is_killed(tmp_path):
    """(b): its socket ends before it does; pages wait for its pidfd, then their content counts as unknown."""
    with Pagerd(tmp_path, host_bytes=64 * SIZE, options=("--no-prefault", "--allow-ipc")) as daemon:
        rig = ordering_rig(daemon.address)
        orders = rig.pager._core.nvme.copies._orders
        os.kill(daemon.process.pid, 19)  # SIGSTOP: in the middle of whatever was asked of it
        told = Told()
        orders.copy(0, np.array([31]), np.array([0]), is_write_back=False, order=told)
        rig.pager._core.nvme.attachment.connection._transport.shut()
        wait_for(lambda: told.doubts == 1)
        assert orders.num_in_doubt == 1 and not told.event.is_done()
        daemon.kill()
        assert told.event.wait(60) and isinstance(told.event.error, TierUnavailableError)
        rig.prefill(rig.start(TOKENS))  # goes on by itself
        daemon.start()
        wait_for(lambda: copies_of(rig)["copies"] == "daemon")
        rig.settle()
        assert not rig.wrong
        rig.close()


def test_a_copy_out_in_doubt_leaves_its_page_to_its_writer(tmp_path):
    """Nothing will be read from its slot, so an append need not wait for a daemon that may take for ever to say so."""
    with serving(tmp_path) as daemon:
        rig = ordering_rig(daemon.address)
        group = rig.pager._core.groups[0]
        seq = rig.start(TOKENS[:6])
        rig.prefill(seq)
        rig.settle()
        gate = Gate(daemon, "demote")
        tail = write_tail_back(rig, seq)
        wait_for(lambda: daemon.service.copies.num_orders > 0)
        break_sockets(daemon)
        wait_for(lambda: copies_of(rig)["copies_in_doubt"] > 0)
        rig.say(seq, [7])  # into the page that the daemon may still read
        assert group.pages.state[tail] == PageState.WRITING_BACK and group.host.num_free < len(group.host)
        gate.open()
        wait_for(lambda: group.pages.state[tail] != PageState.WRITING_BACK)
        rig.say(seq, [8])
        rig.settle()
        rig.pager.check_integrity()
        assert not rig.wrong
        rig.close()


def write_tail_back(rig: Rig, seq: int) -> int:
    """Start a copy-out of the block that the next token goes to; its page."""
    core = rig.pager._core
    group, block_id = core.groups[0], int(core.sequences[seq].tables[0].ids[-1])
    wait_for(lambda: group.slab.room_to_write(1) > 0)
    with core.lock:
        assert core.write_back_blocks(group, np.array([block_id]), "test") == 1
        return int(group.directory.page[block_id])


@pytest.mark.parametrize("broken", [False, True])
def test_a_page_is_not_attended_before_its_copy_in_is_answered(tmp_path, broken):
    """(d), rule 1."""
    rules = Rules.without(Rule.PUBLISH_AFTER_COPY_IN) if broken else ALL_RULES
    with serving(tmp_path) as daemon:
        stored(daemon)
        rig = ordering_rig(daemon.address, rules=rules)
        gate = Gate(daemon, "promote")
        seq = rig.start(TOKENS)
        if broken:
            rig.prefill(seq)
        else:
            with pytest.raises(Busy):
                rig.step([(seq, 1)], timeout_s=0.05)
        gate.open()
        rig.prefill(seq)
        assert bool(rig.wrong) == broken
        rig.settle()
        rig.pager.close()


@pytest.mark.parametrize("broken", [False, True])
def test_a_page_written_during_its_copy_out_is_dirty_again(tmp_path, broken):
    """(d), rule 4: the daemon has read the page and not answered yet when the next token wants to be written there."""
    rules = Rules.without(Rule.WRITTEN_DURING_COPY_OUT_IS_DIRTY) if broken else ALL_RULES
    with serving(tmp_path) as daemon:
        rig = ordering_rig(daemon.address, rules=rules)
        core = rig.pager._core
        seq = rig.start(TOKENS[:6])
        rig.prefill(seq)
        rig.settle()
        demote = daemon.store.core.backend.demote
        gate, record = threading.Event(), demote.record
        demote.record = lambda: (demote.run(lambda: gate.wait(60)), record())[1]  # between the copy and its answer
        tail = write_tail_back(rig, seq)
        wait_for(lambda: daemon.service.copies.num_orders > 0 and demote._workers._queue.qsize() == 1)
        opener = None
        if not broken:  # the append waits for the answer
            opener = threading.Thread(target=gate.set)
            threading.Timer(0.05, opener.start).start()
        rig.say(seq, [7])
        gate.set()
        group = core.groups[0]
        wait_for(lambda: group.pages.copies[tail] == 0 or rig.pager.poll())
        with core.locked():
            if group.pages.state[tail] == PageState.RESIDENT:  # clean, so it may go
                group.evict(group.pages.block[[tail]], "test")
        rig.say(seq, [8])
        assert bool(rig.wrong) == broken
        demote.record = record
        rig.settle()
        rig.close()


@pytest.mark.parametrize("waits", [True, False])
def test_an_order_leaves_only_behind_what_writes_its_page(tmp_path, waits):
    """(e), rule 3: the event of the page's last writer is over before the daemon hears of the copy."""
    with serving(tmp_path) as daemon:
        client, written = Ordering(daemon.address), HostEvent()
        lane = Lane("demote", lambda: None)
        lane.orders = client.orders
        stream = OrderedStream(lane, 0, client.pool.rows, client.backend.demote)
        (row,), slab = client.attachment.reserve(0, 1, 5.0)[0], client.attachment.rows[0]
        client.pool.rows[2] = 1
        if waits:
            stream.wait(written)
        stream.copy_rows(slab, np.array([row]), client.pool.rows, np.array([2]))
        event = stream.record()
        if not waits:
            assert event.wait(60)
        client.pool.rows[2] = 2
        written.finish()
        assert event.wait(60) and event.error is None
        assert (slab[row] == (2 if waits else 1)).all()
        lane.close(5.0)
        client.close()


def test_goodbye_waits_for_the_copies_that_were_ordered(tmp_path):
    with serving(tmp_path) as daemon:
        client = Ordering(daemon.address)
        leased, gate = put(client.attachment, [1], keep=True), Gate(daemon, "promote")
        told = client.order([0], leased, is_write_back=False)
        bye = client.attachment.connection.begin(m.Goodbye(client.attachment.epoch), m.Bye)
        client.say(m.FindModel("nobody's"), m.ModelFound)  # served behind it
        assert not bye.is_over and daemon.store.pinned_slots() == 1
        gate.open()
        bye.result(60)
        assert told.event.wait(60) and told.event.error is None
        assert not daemon.store.pinned_slots()
        client.orders.close()
        client.attachment.connection.close()


# ---------------------------------------------------------------------- where it is not to be had
@pytest.mark.parametrize(
    ("daemon_options", "rig_options", "said"),
    [
        ({"allow_ipc": False}, {}, "set allow_ipc = true"),
        ({}, {"private_host": 16}, "memory is not mapped"),
    ],
)
def test_without_it_copies_are_the_clients_and_it_is_said(tmp_path, caplog, daemon_options, rig_options, said):
    with serving(tmp_path, **daemon_options) as daemon:
        stored(daemon)
        rig = Rig(daemon=daemon.address, backend=CpuBackend(), pages=32, transfer="ipc", **rig_options)
        assert copies_of(rig)["copies"] == "client" and said in copies_of(rig)["transfer_notice"]
        assert said in caplog.text
        rig.prefill(rig.start(TOKENS))
        assert not rig.wrong
        rig.close()


def test_an_export_without_the_feature_is_refused(tmp_path):
    with serving(tmp_path, allow_ipc=False) as daemon:
        client = attach(daemon.address, features=m.ALL_FEATURES)
        assert m.IPC not in client.connection.welcome.features
        with pytest.raises(ProtocolError, match="not granted"):
            client.connection.call(m.Export(client.epoch), m.Exporting)
        with pytest.raises(ProtocolError, match="before EXPORT"):
            client.connection.call(m.Register(client.epoch, client.store, 0, "memfd", b"", 1, SIZE), m.Registered)
        client.goodbye()


def test_it_needs_a_daemon():
    with pytest.raises(ConfigError, match="without a daemon"):
        Rig(backend=CpuBackend(), transfer="ipc")
    with pytest.raises(ConfigError, match="transfer='vmm' is unknown"):
        Rig(backend=CpuBackend(), transfer="vmm")


@pytest.mark.parametrize("oldest", [1, 2])
@pytest.mark.parametrize("newest", [1, 2])
def test_versions_of_both_sides(tmp_path, oldest, newest):
    """Clients that never heard of the feature, and those that have it, with a daemon of either version."""
    with serving(tmp_path, version=newest) as daemon:
        stored(daemon)
        greeting = Greeting("old", features=(m.SLAB,), newest_version=oldest)
        old = Attachment.open(daemon.address, [RIG_LAYOUT], "rig", {}, greeting)
        assert m.IPC not in old.connection.welcome.features
        rig = ordering_rig(daemon.address)
        rig.prefill(rig.start(TOKENS))
        assert not rig.wrong
        rig.close()
        old.goodbye()


def test_a_daemon_that_comes_back_is_asked_anew(tmp_path):
    """What the one refused the other may offer; what is served is right throughout."""
    plain = Pagerd(tmp_path, host_bytes=64 * SIZE, options=("--no-prefault",))
    offering = Pagerd(tmp_path, host_bytes=64 * SIZE, options=("--no-prefault", "--allow-ipc"))
    with plain:
        rig = Rig(daemon=plain.address, backend=CpuBackend(poison=True), pages=32, transfer="ipc")
        assert copies_of(rig)["copies"] == "client"
        rig.prefill(rig.start(TOKENS))
        plain.kill()
        with offering:
            wait_for(lambda: copies_of(rig)["copies"] == "daemon")
            assert not copies_of(rig)["transfer_notice"]
            rig.prefill(rig.start([1, *TOKENS]))
            wait_for(lambda: all_in_daemon(rig))
            rig.settle()
            assert not rig.wrong
            rig.close()
