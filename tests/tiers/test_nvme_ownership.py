"""Who has a store, and what lasts of it: names, modes, the lock, calls that end late, tickets that tell the truth."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kvtier.tiers.errors import StoreLockedError, TierUnavailableError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme import maintenance
from kvtier.tiers.nvme.blocks import BlockIo
from kvtier.tiers.nvme.files import Tails
from kvtier.tiers.nvme.manifest import Manifest
from kvtier.tiers.nvme.store import STAMP, NvmeTier, StoreIdentity
from kvtier.tiers.streams import aligned_rows

sys.path.insert(0, str(Path(__file__).parent.parent / "faults"))
from blocks_of import LAYOUT, CpuBackend, SystemCalls, bytes_of, key_of, open_tier, put, wrong_blocks


def begin(tier: NvmeTier, slots: np.ndarray, numbers: list[int]):
    """A write of rows that go to the disk as they lie."""
    stamps, rows = np.zeros(len(slots), STAMP), aligned_rows(len(slots), LAYOUT.block_bytes)
    for i, number in enumerate(numbers):
        stamps[i]["key"], rows[i] = key_of(number), bytes_of(key_of(number))
    return tier.write(0, slots, rows, np.arange(len(slots)), stamps)


# ---------------------------------------------------------------------- what others do to its files
def rewrite(path: Path, slot: int) -> None:
    """As any Zarr client would: its shard is written anew and renamed into place."""
    import zarr

    group = zarr.open_group(str(path / "blocks.zarr"), mode="r+")
    group["g0"][slot] = 1.0


def test_a_shard_rewritten_while_the_store_is_open_is_noticed_before_anything_counts_as_durable(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    put(tier, tier.allocate(0, 8), list(range(8)))
    tier.flush()
    rewrite(tmp_path / "s", 1)
    tier._committer.close()  # who asks is told, not a thread
    put(tier, tier.allocate(0, 4), list(range(8, 12)))
    with pytest.raises(TierUnavailableError, match="1 segments could not be made durable"):
        tier.flush()
    assert not {key_of(n) for n in range(8, 12)} & {stamp["key"].tobytes() for stamp in tier.recovered()[0][1]}
    tier.flush()  # what is left of it turns out to be another's
    assert put(tier, tier.allocate(0, 20), list(range(20, 40))).all()
    tier.flush()
    tier.close()
    again = open_tier(tmp_path / "s", backend)
    assert wrong_blocks(again) == (0, {key_of(n) for n in range(20, 40)})
    again.close()


def test_a_shard_deleted_while_the_store_is_open_takes_nothing_that_is_promised_later(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    tier._committer.close()
    put(tier, tier.allocate(0, 4), list(range(4)))
    tier.flush()
    next((tmp_path / "s" / "blocks.zarr" / "g0").glob("c.0.*")).unlink()
    put(tier, tier.allocate(0, 4), list(range(4, 8)))
    with pytest.raises(TierUnavailableError):
        tier.flush()
    put(tier, tier.allocate(0, 4), list(range(8, 12)))
    tier.flush()
    tier.close()
    again = open_tier(tmp_path / "s", backend)
    assert wrong_blocks(again) == (0, {key_of(n) for n in range(8, 12)})
    again.close()


def test_a_shard_rewritten_while_the_store_is_closed_is_a_miss_and_its_slots_are_used_again(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    put(tier, tier.allocate(0, 20), list(range(20)))
    size = tier.geometry(0).slots_per_segment
    tier.close()
    rewrite(tmp_path / "s", 1)
    again = open_tier(tmp_path / "s", backend)
    assert wrong_blocks(again) == (0, {key_of(n) for n in range(size, 20)})
    again.quarantine(0, np.arange(size))
    slots = again.allocate(0, again.free_slots(0))
    assert put(again, slots, list(range(100, 100 + len(slots)))).all() and wrong_blocks(again)[0] == 0
    again.close()


# ---------------------------------------------------------------------- identity, lock, modes
class Recording(SystemCalls):
    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []

    def fdatasync(self, fd):
        self.done.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        super().fdatasync(fd)

    def replace(self, source, target):
        self.done.append(("replace", f"{source.name} {target.parent.name}/{target.name}"))
        super().replace(source, target)

    def sync_directory(self, path):
        self.done.append(("names", path.name))
        super().sync_directory(path)


def test_identity_and_metadata_are_on_the_medium_before_their_names_are(tmp_path, backend):
    calls = Recording()
    open_tier(tmp_path / "in" / "s", backend, calls=calls).close()
    assert ("names", "in") in calls.done and ("names", tmp_path.name) in calls.done
    renamed = [(i, *said.split()) for i, (what, said) in enumerate(calls.done) if what == "replace"]
    assert [name for _, _, name in renamed][:3] == ["blocks.zarr/zarr.json", "g0/zarr.json", "s/store.json"]
    for i, spare, name in renamed[:3]:
        assert calls.done[i - 1] == ("sync", spare) and calls.done[i + 1] == ("names", name.split("/")[0])
    made = calls.done.index(("names", "blocks.zarr"))
    assert made < renamed[1][0]  # g0's own name


def test_who_was_overtaken_before_the_lock_looks_again(tmp_path, backend, monkeypatch):
    """Between a first look and the lock, another process may have made the store, filled it and gone."""
    path, real, others = tmp_path / "s", fcntl.flock, []

    def overtaken(fd, how):
        if not others:
            others.append(True)
            tier = open_tier(path, backend)
            put(tier, tier.allocate(0, 8), list(range(8)))
            tier.put_session("a", {"n": 1})
            tier.close()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    tier = open_tier(path, backend)
    assert wrong_blocks(tier) == (0, {key_of(n) for n in range(8)}) and tier.sessions() == {"a": {"n": 1}}
    tier.close()


def test_a_directory_that_was_there_before_becomes_private_and_so_are_its_files(tmp_path, backend):
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o755)
    tier = open_tier(tmp_path / "s", backend)
    put(tier, tier.allocate(0, 2), [0, 1])
    tier.put_session("a", {})
    tier.close()
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "s").rglob("*") if file.is_file()} == {0o600}


class NoDirect(SystemCalls):
    def open(self, path, flags):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "injected")
        return super().open(path, flags)


@pytest.mark.parametrize(("heads", "is_told"), [(1, False), (64, True)])
def test_a_file_system_that_refuses_direct_io_is_told_once_where_it_matters(tmp_path, backend, caplog, heads, is_told):
    layout = KVLayout(num_layers=2, num_kv_heads=heads, head_dim=32, block_size=16, dtype="float32")
    with caplog.at_level(logging.WARNING, "kvtier.nvme"):
        identity, calls = StoreIdentity("m", (layout,)), NoDirect()
        tier = NvmeTier.open(
            tmp_path / "s", identity, num_slots=[8], backend=backend, calls=calls, segment_bytes=1 << 20
        )
    assert caplog.text.count("event=no_direct_io") == is_told and not tier.status()["direct_io"]
    rows, stamps = aligned_rows(8, layout.block_bytes), np.zeros(8, STAMP)
    rows[:] = np.random.default_rng(0).integers(0, 255, rows.shape, np.uint8)
    ticket = tier.write(0, tier.allocate(0, 8), rows, np.arange(8), stamps)
    assert ticket.event.wait(60) and ticket.ok.all()
    tier.close()


# ---------------------------------------------------------------------- calls that end late
class Held(SystemCalls):
    """Writes wait until they may go on."""

    def __init__(self) -> None:
        self.holds, self.reached, self.goes_on = False, threading.Event(), threading.Event()

    def pwritev(self, fd, buffers, offset):
        if self.holds:
            self.reached.set()
            assert self.goes_on.wait(60)
        return super().pwritev(fd, buffers, offset)


def test_a_store_is_not_let_go_of_while_bytes_are_on_their_way_into_it(tmp_path, backend, caplog):
    calls = Held()
    tier = open_tier(tmp_path / "s", backend, calls=calls)
    calls.holds = True
    ticket = begin(tier, tier.allocate(0, 4), list(range(4)))
    assert calls.reached.wait(60)
    tier.close(timeout_s=0.0)
    assert "event=store_not_closed" in caplog.text
    with pytest.raises(StoreLockedError):
        open_tier(tmp_path / "s", backend)
    calls.goes_on.set()
    assert ticket.event.wait(60) and ticket.ok.all()
    tier.close()
    again = open_tier(tmp_path / "s", backend)
    assert wrong_blocks(again) == (0, {key_of(n) for n in range(4)})
    again.close()


def test_closing_waits_for_writes_that_are_queued(tmp_path):
    backend, calls = CpuBackend(io_depth=1), Held()
    tier = open_tier(tmp_path / "s", backend, calls=calls)
    calls.holds = True
    tickets = [begin(tier, tier.allocate(0, 2), [2 * i, 2 * i + 1]) for i in range(10)]
    assert calls.reached.wait(60)
    closing = threading.Thread(target=tier.close)
    closing.start()
    calls.goes_on.set()
    closing.join(60)
    assert all(ticket.event.is_done() and ticket.ok.all() for ticket in tickets)
    again = open_tier(tmp_path / "s", backend)
    assert wrong_blocks(again) == (0, {key_of(n) for n in range(20)})
    again.close()
    backend.close(5)


def test_a_closed_journal_writes_to_nobody_elses_file(tmp_path):
    log = Manifest.open(tmp_path / "manifest.log")
    fd = log._fd
    log.close()
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    os.dup2(other, fd)
    with pytest.raises(OSError, match="closed"):
        log.put_session("a", {})
    assert (tmp_path / "other").stat().st_size == 0
    os.close(fd)
    if other != fd:
        os.close(other)


# ---------------------------------------------------------------------- steps that raise
def one_raises(monkeypatch, step: str):
    """One call of a step runs out of memory, the third."""
    real, left = getattr(BlockIo, step), [3]

    def raising(self, *arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("injected")
        return real(self, *arguments, **named)

    monkeypatch.setattr(BlockIo, step, raising)


@pytest.mark.parametrize("step", ["before_write", "call_write", "after_write"])
def test_a_ticket_says_ok_of_what_is_listed_and_of_nothing_else(tmp_path, backend, monkeypatch, step):
    tier = open_tier(tmp_path / "s", backend)
    slots = tier.allocate(0, 60)
    one_raises(monkeypatch, step)
    ticket = begin(tier, slots[::2], list(range(30)))  # no two are neighbours: thirty calls
    assert ticket.event.wait(60) and isinstance(ticket.event.error, MemoryError)
    assert ticket.ok.sum() == 29
    assert slots[::2][ticket.ok].tolist() == tier.recovered()[0][0].tolist()
    tier.close()


def test_a_copy_that_lacks_blocks_says_so(tmp_path, backend, monkeypatch):
    tier = open_tier(tmp_path / "s", backend)
    put(tier, tier.allocate(0, 60), list(range(60)))
    tier.free(0, np.arange(0, 60, 2))
    tier.close()
    one_raises(monkeypatch, "call_write")
    with pytest.raises(TierUnavailableError, match="not whole"):
        maintenance.copy(tmp_path / "s", tmp_path / "t", lambda done, total: None)


def test_a_check_that_runs_out_of_memory_calls_nothing_bad(tmp_path, backend, monkeypatch):
    tier = open_tier(tmp_path / "s", backend)
    put(tier, tier.allocate(0, 60), list(range(60)))
    tier.free(0, np.arange(0, 60, 2))
    tier.close()
    with monkeypatch.context() as broken:
        one_raises(broken, "after_read")
        with pytest.raises(MemoryError):
            maintenance.check(tmp_path / "s", lambda done, total: None, repair=True)
    assert maintenance.check(tmp_path / "s", lambda done, total: None).blocks == 30


# ---------------------------------------------------------------------- memory of calls
def test_memory_of_calls_does_not_grow_with_the_kinds_of_calls(tmp_path):
    choose, tails = random.Random(0), Tails()
    for _ in range(300):
        tails.give_back(tails.lend(choose.randrange(1, 257), 4096))
    (kept,) = tails._free.values()
    assert sum(each.nbytes for each in kept) <= 256 * 4096
