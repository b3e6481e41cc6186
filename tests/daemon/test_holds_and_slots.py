"""What the daemon holds for a client and what the client believes of it agree; slots given back are written to no more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from kvtier.pager.client import handles as handles_module
from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.pager.client.handles import Handles
from kvtier.pager.client.slab import LeasedSlab
from kvtier.pager.client.tier import RemoteTier
from kvtier.pager.wire.messages import IS_HELD, TAKEN
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import Busy
from kvtier.tiers.nvme.manifest import STAMP

from ..pager.harness import BLOCK, LAYOUT, Rig
from .gated import all_in_daemon, break_sockets
from .inside import InsideDaemon
from .raw import attach, block, get, key, put
from .running import wait_for

SIZE = LAYOUT.block_bytes
TOKENS = list(range(100, 100 + 4 * BLOCK + 1))
SOON_S = 10.0


@pytest.fixture
def daemon(tmp_path) -> Iterator[InsideDaemon]:
    with InsideDaemon(tmp_path, host_bytes=128 * SIZE) as inside:
        yield inside


def client(daemon: InsideDaemon, *, io_depth: int = 12, **options) -> Rig:
    return Rig(daemon=daemon.address, backend=CpuBackend(io_depth=io_depth), **({"pages": 32} | options))


def stored(daemon: InsideDaemon, *prompts: list[int]) -> None:
    """By another client, which holds none of it any more."""
    rig = client(daemon)
    for tokens in prompts:
        rig.prefill(seq := rig.start(tokens))
        wait_for(lambda: all_in_daemon(rig))
        rig.pager.finish(seq)
    rig.close()


def held(daemon: InsideDaemon) -> int:
    """How many blocks the daemon holds for the client that came last."""
    with daemon.store.core.lock:
        return len(list(daemon.store.clients)[-1].holdings[0].held)


def believed(rig: Rig) -> int:
    return int(rig.pager._core.nvme.handles[0].is_held.sum())


def found_and_let_go(rig: Rig, daemon: InsideDaemon, tokens: list[int] = TOKENS) -> None:
    """Known, held for a beat, and not any more."""
    assert rig.pager.match(tokens).tokens == len(tokens) // BLOCK * BLOCK
    wait_for(lambda: not believed(rig) and not held(daemon))


def keys_of(rig: Rig, tokens: list[int] = TOKENS) -> tuple:
    chain, keys = rig.pager._core.chain("default"), []
    chain.extend(keys, tokens)
    return chain, keys


def agree(rig: Rig, daemon: InsideDaemon, count: int) -> bool:
    rig.pager.poll()
    return held(daemon) == believed(rig) == count


def forget(rig: Rig) -> None:
    """All that it knows of."""
    group = rig.pager._core.groups[0]
    with rig.pager._core.lock:
        group.cold.drop_copies(np.flatnonzero(group.directory.nvme_valid), "test")
        assert not group.directory.is_live.any()


class Gated:
    """A call of an attachment that waits before it begins, or before its answer is seen."""

    def __init__(self, attachment: Attachment, name: str, *, answered: bool = False) -> None:
        self.has_come, self._may_go_on, self.is_over = (threading.Event() for _ in range(3))
        call = getattr(attachment, name)

        def gated(*given, **named):
            result = call(*given, **named) if answered else None
            self.has_come.set()
            assert self._may_go_on.wait(60)
            result = result if answered else call(*given, **named)
            self.is_over.set()
            return result

        setattr(attachment, name, gated)

    def open(self) -> None:
        self._may_go_on.set()


def looked_up(daemon: InsideDaemon) -> tuple[Rig, Gated]:
    """Blocks that a client has just found and nobody refers to; the UNHOLD that follows waits at the gate."""
    stored(daemon, TOKENS)
    rig = client(daemon)
    gate = Gated(rig.pager._core.nvme.attachment, "unhold")
    assert rig.pager.match(TOKENS).tokens == 4 * BLOCK
    return rig, gate


# ---------------------------------------------------------------------- slots given back
def test_a_slab_that_is_left_has_nothing_to_write_to():
    slab = LeasedSlab(16)
    slab.attach(np.zeros((4, SIZE), np.uint8), np.zeros(4, np.uint64), 7)
    slab.add_spare(7, np.arange(3), np.zeros(3, np.uint64))
    assert slab.room_to_write(3) == 3
    slab.begin_write(np.array([0]))
    slab.let_go(np.array([0]))
    slab.leave()
    slab.add_spare(7, np.arange(1), np.zeros(1, np.uint64))  # an answer that was on its way
    assert slab.room_to_write(1) == 0
    assert not len(slab.take_releases()) and not len(slab.take_surplus(0))


def test_a_pager_between_two_attachments_writes_to_no_slot_of_the_first(daemon):
    """The daemon lives and has given its slots to somebody else; tails that only the device has could go down there."""
    rig = client(daemon)
    for start in (1000, 2000, 3000):
        rig.prefill(rig.start(list(range(start, start + BLOCK + 2))))
    wait_for(lambda: all_in_daemon(rig))
    core, sharing = rig.pager._core, rig.pager._remote._sharing
    group = core.groups[0]
    with core.lock:
        group.slab.room_to_write(2)
    wait_for(lambda: len(group.slab._spare) >= 2)
    attached, seen = sharing.attached, []

    def attached_late(attachment, stop):
        other = Attachment.open(daemon.address, [LAYOUT], "rig", {}, Greeting("other"))
        rows = np.concatenate([other.reserve(0, 16, 60.0)[0] for _ in range(2)])
        other.rows[0][rows] = 0xEE
        with core.lock:
            blocks = np.array([seq.tables[0].ids[-1] for seq in core.sequences.values()])
            started = core.write_back_blocks(group, blocks, "test")
        core.backend.demote.synchronize(60)
        seen.append((started, bool((other.rows[0][rows] == 0xEE).all())))
        other.goodbye()
        return attached(attachment, stop)

    sharing.attached = attached_late
    break_sockets(daemon)
    wait_for(lambda: rig.pager.status()["tiers"]["daemon"]["is_attached"] and seen)
    assert seen == [(0, True)]
    rig.say(next(iter(core.sequences)), [1, 2, 3])
    assert not rig.wrong
    rig.close()


# ---------------------------------------------------------------------- as many as a client knows of
def test_a_full_table_of_handles_makes_room_for_what_others_stored(daemon):
    prompts = [list(range(start, start + 4 * BLOCK + 1)) for start in range(1000, 9000, 1000)]
    stored(daemon, *prompts)
    rig = client(daemon)
    rig.pager._core.nvme.handles[0].limit = 10
    for tokens in prompts:
        assert rig.pager.match(tokens).tokens == 4 * BLOCK
    wait_for(lambda: agree(rig, daemon, 0), SOON_S)
    rig.prefill(rig.start(prompts[0]))
    assert rig.pager.counters.get("computed_tokens") <= BLOCK and not rig.wrong
    rig.pager.check_integrity()
    rig.close()


def test_what_was_held_and_found_no_handle_is_held_no_longer(daemon):
    tokens = list(range(1000, 1000 + 20 * BLOCK + 1))
    stored(daemon, tokens)
    rig = client(daemon)
    rig.pager._core.nvme.handles[0].limit = 12
    assert rig.pager.match(tokens).tokens == 12 * BLOCK
    wait_for(lambda: agree(rig, daemon, 0), SOON_S)
    rig.close()


def test_a_look_up_of_what_is_known_leaves_no_hold_behind(daemon):
    stored(daemon, TOKENS)
    rig = client(daemon)
    found_and_let_go(rig, daemon)
    rig.pager._remote._sharing.find_all(*keys_of(rig))
    wait_for(lambda: agree(rig, daemon, 0), SOON_S)
    rig.close()


# ---------------------------------------------------------------------- answers to what was written
class Short:
    """As much of an attachment as takes blocks over a socket; it has one slot, once."""

    version, is_lost, epoch = 2, False, 1

    def __init__(self, slots: int) -> None:
        self.capacity_blocks, self.slots, self.committed = [100], slots, threading.Event()

    def reserve(self, group: int, count: int, timeout_s: float) -> tuple:
        if not self.slots:
            raise Busy("no room", retry_after_s=0.0)
        count = min(count, self.slots)
        self.slots -= count
        return np.arange(count), np.zeros(count, np.uint64)

    def commit(self, group: int, rows, stamps, parents) -> tuple:
        return np.full(len(rows), TAKEN + IS_HELD, np.uint8), np.zeros(len(rows), np.uint64)

    def release(self, group: int, rows) -> None:
        self.committed.set()

    def write_rows(self, *given) -> None:
        pass


@pytest.fixture
def backend() -> Iterator[CpuBackend]:
    made = CpuBackend(io_depth=1)
    yield made
    made.close(60)


def written(tier: RemoteTier, count: int, tokens: int = BLOCK) -> tuple:
    handles = tier.allocate(0, count)
    stamps = np.zeros(count, STAMP)
    stamps["key"], stamps["tokens"] = np.frombuffer(b"".join(map(key, range(count))), "V32"), tokens
    return handles, tier.write(0, handles, np.zeros((count, SIZE), np.uint8), np.arange(count), stamps)


def test_blocks_that_were_committed_before_room_ran_out_count(backend):
    tier = RemoteTier(Short(1), backend, None, lambda: True)
    slots, ticket = written(tier, 2)
    assert ticket.event.wait(60) and ticket.event.error is None
    assert ticket.ok.tolist() == tier.handles[0].is_held[slots].tolist() == [True, False]
    assert tier.last_write_error == "no room"


def test_a_private_block_is_not_taken_for_an_earlier_one(backend):
    """Of the same number and version, while the daemon still has that one: it would say that it has the block already."""
    tier = RemoteTier(Short(2), backend, None, lambda: True)
    first, second = (written(tier, 1, tokens=0)[0] for _ in range(2))
    assert tier.handles[0].keys(first) != tier.handles[0].keys(second)


def test_what_a_worker_notes_while_the_table_grows_is_not_lost(backend, monkeypatch):
    attachment = Short(1)
    tier = RemoteTier(attachment, backend, None, lambda: True)
    gate = Gated(attachment, "commit")
    slots, ticket = written(tier, 1)
    assert gate.has_come.wait(60)

    def concatenate(arrays):
        grown = np.concatenate(arrays)
        if grown.dtype == bool and not attachment.committed.is_set():
            gate.open()
            assert attachment.committed.wait(60)
            ticket.event.wait(0.2)
        return grown

    monkeypatch.setattr(handles_module, "np", SimpleNamespace(**{**vars(np), "concatenate": concatenate}))
    tier.handles[0]._grow()
    assert ticket.event.wait(60)
    assert tier.handles[0].is_held[slots].all() and tier.handles[0].is_near[slots].all()


def test_a_hold_that_an_unhold_may_have_followed_is_in_doubt_until_it_is_held_anew():
    handles = Handles(10)
    one, two = handles.allocate(2)[:, None]
    handles.begin_unhold()
    since = handles.unholds_over
    handles.end_unhold()
    handles.note_held(one, since)
    handles.note_held(two, handles.unholds_over)
    assert handles.is_held[[one, two]].all()
    assert not handles.is_surely_held(one) and handles.is_surely_held(two)
    handles.note_held(two, since)  # sure already: nobody let go of it meanwhile
    handles.note_held(one, handles.unholds_begun)
    assert handles.is_surely_held(one) and handles.is_surely_held(two)


# ---------------------------------------------------------------------- in order
def test_a_hold_does_not_overtake_an_unhold(daemon):
    rig, gate = looked_up(daemon)
    rig.pager.poll()
    assert gate.has_come.wait(60) and held(daemon) == 4
    rig.start(TOKENS)
    rig.pager.poll()
    wait_for(lambda: rig.pager._remote._sharing._is_reconciling[0] or believed(rig) == 4)
    threading.Event().wait(0.2)  # as long as a HOLD takes that waits for nothing
    gate.open()
    assert gate.is_over.wait(60)
    wait_for(lambda: agree(rig, daemon, 4), SOON_S)
    rig.close()


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_a_look_up_beside_an_unhold_is_made_sure_of(daemon, is_forgotten):
    rig, gate = looked_up(daemon)
    attachment = rig.pager._core.nvme.attachment
    lookup = attachment.lookup
    if is_forgotten:
        forget(rig)
    rig.pager.poll()
    assert gate.has_come.wait(60)

    def overtaken(*given, **named):
        found = lookup(*given, **named)
        gate.open()
        wait_for(lambda: not held(daemon))
        return found

    attachment.lookup = overtaken
    with rig.pager._core.lock:  # no beat between what was found and who refers to it
        rig.pager._remote._sharing.find_all(*keys_of(rig))
        rig.start(TOKENS)
    wait_for(lambda: agree(rig, daemon, 4), SOON_S)
    rig.close()


@pytest.mark.parametrize("is_known_again", [False, True])
def test_a_hold_for_a_handle_that_is_no_more_is_undone(daemon, is_known_again):
    stored(daemon, TOKENS)
    rig = client(daemon)
    found_and_let_go(rig, daemon)
    core = rig.pager._core
    gate = Gated(core.nvme.attachment, "hold", answered=True)
    seq = rig.start(TOKENS)
    rig.pager.poll()
    assert gate.has_come.wait(60) and held(daemon) == 4
    with core.lock:
        rig.pager.finish(seq)
        forget(rig)
        if is_known_again:
            rig.start(TOKENS)
    gate.open()
    wait_for(lambda: agree(rig, daemon, 4 * is_known_again), SOON_S)
    rig.close()


def test_what_is_given_back_waits_for_no_reads(daemon):
    stored(daemon, TOKENS)
    rig = client(daemon)
    seq, may_go_on = rig.start(TOKENS), threading.Event()
    wait_for(lambda: agree(rig, daemon, 4))
    for _ in range(rig.backend.read_io.num_threads):
        rig.backend.read_io.submit(lambda: may_go_on.wait(60))
    try:
        rig.pager.finish(seq)
        wait_for(lambda: agree(rig, daemon, 0), SOON_S)
    finally:
        may_go_on.set()
    rig.close()


def test_a_daemon_that_goes_while_a_hold_is_under_way_stops_nobody(daemon):
    stored(daemon, TOKENS)
    rig = client(daemon, io_depth=1)
    found_and_let_go(rig, daemon)
    core = rig.pager._core
    gate = Gated(core.nvme.attachment, "hold", answered=True)
    seq = rig.start(TOKENS)
    rig.pager.poll()
    assert gate.has_come.wait(60)
    reading = threading.Thread(target=rig.prefill, args=(seq,), daemon=True)
    with core.lock:
        lease = Gated(core.nvme.attachment, "lease")
    reading.start()
    lease.has_come.wait(1)  # its read is under way, if it need not wait for that HOLD
    break_sockets(daemon)
    wait_for(lambda: rig.pager._remote._link.num_losses == 1)
    lease.open()
    threading.Event().wait(0.2)
    gate.open()
    assert core.lock.acquire(timeout=SOON_S)
    core.lock.release()
    reading.join(60)
    assert not rig.wrong
    rig.close()


# ---------------------------------------------------------------------- in the daemon
@pytest.mark.parametrize("is_stored_again", [False, True])
def test_a_held_block_that_was_lost_can_be_let_go_of(daemon, is_stored_again):
    one, two = attach(daemon.address), attach(daemon.address)
    put(one, [1, 2])
    core = daemon.store.core
    group, (first, second) = core.groups[0], daemon.store.clients
    with core.lock:
        lost = group.directory.find([key(1)])
        group.leave_host(lost)
        group.unname_lost(lost)
    if is_stored_again:
        put(two, [1])
    one.unhold(0, key(2) + key(1))
    assert not first.holdings[0].held and len(second.holdings[0].held) == is_stored_again
    assert not group.directory.is_live[lost].any() or is_stored_again
    daemon.store.check_integrity()
    if is_stored_again:
        assert (get(two, 1) == block(1)).all()
    one.goodbye()
    two.goodbye()
