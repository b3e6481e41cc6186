"""The store under kill -9, failing calls and flipped bits: nothing wrong is ever served, nothing acknowledged is lost."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from kvtier.tiers.errors import KvTierError
from kvtier.tiers.staged import StagedWorkers

sys.path.insert(0, str(Path(__file__).parent))
from blocks_of import LARGE, LAYOUT, CpuBackend, SystemCalls, key_of, open_tier, put, wrong_blocks

from kvtier.tiers.nvme.identity import PROBE_FILE
from kvtier.tiers.nvme.journal import whole_frames
from kvtier.tiers.nvme.layout import CRC_BYTES

MEMORY = Path("/dev/shm")


@pytest.fixture
def backend():
    backend = CpuBackend()
    yield backend
    backend.close(5)


@pytest.fixture
def scratch(tmp_path):
    """A folder in memory, where the system has one: these tests break the calls themselves, and need no disk to wait for."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="kvtier-faults-", dir=MEMORY) as folder:
        yield Path(folder)


# ---------------------------------------------------------------------- kill -9
def kill_loops(path, loops: int, seed: int, codec: str = "none", size: str = "small") -> dict[str, int]:
    script = Path(__file__).parent / "kill_loop.py"
    command = [sys.executable, script, path, str(loops), str(seed), codec, size]
    env = os.environ | {
        "PYTHONPATH": str(script.parent),
        "OMP_NUM_THREADS": "1",
    }  # with PYTHONSAFEPATH a script's own folder is not searched
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(900)
def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path, seed):
    totals = kill_loops(tmp_path / "s", 300, seed)
    assert totals["wrong"] == totals["lost"] == 0 and totals["acknowledged"] > 30 and totals["kept"] > 0, totals


def test_killed_writers_of_compressed_blocks_lose_nothing_either(tmp_path, seed):
    totals = kill_loops(tmp_path / "s", 10, seed, "zstd")
    assert totals["wrong"] == totals["lost"] == 0 and totals["acknowledged"] > 10 and totals["kept"] > 0, totals


def test_killed_writers_of_rounded_blocks_lose_nothing_either(tmp_path, seed):
    """And none is rounded twice: what comes back is one rounding of what was written, to the bit."""
    totals = kill_loops(tmp_path / "s", 5, seed, "int4")
    assert totals["wrong"] == totals["lost"] == 0 and totals["acknowledged"] > 5 and totals["kept"] > 0, totals


def test_killed_writers_of_large_blocks_lose_nothing_either(tmp_path, seed):
    """As in use: past the page cache, in steps that change hands between threads."""
    totals = kill_loops(tmp_path / "s", 15, seed, size="large")
    assert totals["wrong"] == totals["lost"] == 0 and totals["acknowledged"] > 5 and totals["kept"] > 0, totals


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("loops", "codec"), [(5000, "none"), (300, "zstd"), (100, "int4")])
def test_killed_writers_for_a_long_time(tmp_path, seed, loops, codec):
    totals = kill_loops(tmp_path / "s", loops, seed, codec)
    assert totals["wrong"] == totals["lost"] == 0, totals


# ---------------------------------------------------------------------- calls that fail
class FailingCalls(SystemCalls):
    """The n-th call fails, or does half of what it was asked to. `failed` says whether it came to that."""

    def __init__(self, n: int, how: str) -> None:
        self.left, self.how, self.failed = n, how, False

    def _fails(self) -> bool:
        self.left -= 1
        if self.left == 0:
            self.failed = True
            if self.how != "short":
                raise OSError(getattr(errno, self.how), f"injected {self.how}")
        return self.left == 0

    def open(self, path, flags):
        self._fails()
        return super().open(path, flags)

    def preadv(self, fd, buffers, offset):
        done = super().preadv(fd, buffers, offset)
        return done // 2 if self._fails() else done

    def pwritev(self, fd, buffers, offset):
        if self._fails():  # a torn write: the first half goes down
            whole = b"".join(bytes(b) for b in buffers)
            plain = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
            try:
                return os.pwrite(plain, whole[: len(whole) // 2], offset)
            finally:
                os.close(plain)
        return super().pwritev(fd, buffers, offset)

    def append(self, fd, frame):
        return super().append(fd, frame[: max(1, len(frame) // 2)] if self._fails() else frame)

    def fdatasync(self, fd):
        self._fails()
        super().fdatasync(fd)

    def fallocate(self, fd, size):
        self._fails()
        super().fallocate(fd, size)

    def set_size(self, fd, size):
        self._fails()
        super().set_size(fd, size)

    def replace(self, source, target):
        self._fails()
        super().replace(source, target)

    def sync_directory(self, path):
        self._fails()
        super().sync_directory(path)

    def next_byte(self, fd, offset):
        self._fails()
        return super().next_byte(fd, offset)

    def punch(self, fd, offset, size):
        self._fails()
        super().punch(fd, offset, size)


def fill(tier) -> None:
    put(tier, tier.allocate(0, 12), list(range(12)))
    tier.flush()


def rewrite(tier) -> None:
    slots = tier.allocate(0, 6)
    put(tier, slots, list(range(100, 106)))
    tier.free(0, slots[::2])
    put(tier, tier.allocate(0, 5), list(range(200, 205)))
    tier.flush()


def read_all(tier) -> None:
    assert wrong_blocks(tier)[0] == 0


def sessions(tier) -> None:
    for i in range(4):
        tier.put_session(f"s{i}", {"n": i})
    tier.drop_session("s1")
    tier.flush()


def many_commits(tier) -> None:
    for i in range(4):
        put(tier, tier.allocate(0, 2), [300 + 2 * i, 301 + 2 * i])
        tier.flush()


def quarantine(tier) -> None:
    tier.quarantine(0, tier.recovered()[0][0][:3])
    tier.flush()


def relocate(tier) -> None:
    slots, targets = tier.recovered()[0][0][:6], tier.allocate(0, 6)
    ticket = tier.relocate(0, slots, targets)
    assert ticket.event.wait(60) and ticket.event.error is None
    tier.free(0, np.concatenate([slots[ticket.ok], targets[~ticket.ok]]))
    tier.flush()


def shrink(tier) -> None:
    put(tier, tier.allocate(0, 4), list(range(400, 404)))
    tier.shrink_journal()
    tier.flush()


def grow(tier) -> None:
    """A session, and the metadata written anew for a store that became larger."""
    tier.put_session("s", {"summary": {"n": 1}})
    tier.flush()


SCRIPTS = [fill, rewrite, read_all, sessions, many_commits, quarantine, relocate]


def promised(tier, safe: set[bytes]) -> None:
    """Keep `safe` up to date: what a flush that returned has promised, and nobody has given up since."""
    flush, free = tier.flush, tier.free

    def listed() -> set[bytes]:
        return {stamp["key"].tobytes() for stamp in tier.recovered()[0][1]}

    def flush_and_promise() -> None:
        flush()
        safe.update(listed())

    def free_and_forget(group, slots) -> None:
        keys = {stamp["key"].tobytes() for stamp in tier.stamps(group, slots)}
        free(group, slots)
        safe.difference_update(keys - listed())

    tier.flush, tier.free = flush_and_promise, free_and_forget


class AfterPowerLoss(SystemCalls):
    def boot_id(self):
        return "another boot"


def kept_by_a_crash(tier, path, copy, backend, layout) -> set[bytes]:
    """Keys that are right when the machine stops now."""
    if tier._committer is not None:
        tier._committer.close()  # the copy is of one moment
    assert tier._writer.wait(60)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    again = open_tier(copy, backend, calls=AfterPowerLoss(), layout=layout)
    wrong, right = wrong_blocks(again)
    again.close()
    assert wrong == 0
    return right


@pytest.mark.parametrize(
    ("codec", "script", "how"),
    [("none", s, how) for s in SCRIPTS for how in ("EIO", "ENOSPC", "short")]
    + [("none", shrink, "EIO"), ("none", shrink, "short"), ("none", grow, "EIO")]
    + [("split", s, "EIO") for s in (fill, rewrite, read_all)],
)
def test_a_fault_at_every_call_is_never_served_and_never_a_foreign_exception(scratch, backend, script, how, codec):
    fail_at_every_call(scratch, backend, script, how, codec)


QUICK = [(fill, "EIO"), (rewrite, "ENOSPC"), (read_all, "short")]  # each takes as long as a dozen of the small ones


@pytest.mark.parametrize(
    ("script", "how"),
    [
        pytest.param(script, how, marks=() if (script, how) in QUICK else pytest.mark.soak)
        for script in SCRIPTS
        for how in ("EIO", "ENOSPC", "short")
    ],
)
def test_a_fault_at_every_call_that_goes_past_the_page_cache(tmp_path, monkeypatch, script, how):
    """As in use: large blocks, in steps that change hands between threads."""
    backend, begin, begun = CpuBackend(io_depth=1), StagedWorkers._begin, []
    monkeypatch.setattr(StagedWorkers, "_begin", lambda *said: (begun.append(1), begin(*said)))
    fail_at_every_call(tmp_path, backend, script, how, "none", LARGE)
    assert begun
    backend.close(5)


def fail_at_every_call(tmp_path, backend, script, how, codec, layout=LAYOUT) -> None:
    pristine = tmp_path / "pristine"
    tier = open_tier(pristine, backend, codec=codec, layout=layout)
    put(tier, tier.allocate(0, 20), list(range(500, 520)))
    tier.close()
    slots = 512 if script is grow else 256
    for n in range(1, 500):
        path, calls = tmp_path / "s", FailingCalls(n, how)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(pristine, path)
        tier, safe = None, {key_of(number) for number in range(500, 520)}
        try:
            tier = open_tier(path, backend, slots=slots, calls=calls, layout=layout)
            promised(tier, safe)
            script(tier)
            assert wrong_blocks(tier)[0] == 0
        except KvTierError:
            pass
        if tier is not None:
            if how == "EIO":
                assert safe <= kept_by_a_crash(tier, path, tmp_path / "crashed", backend, layout), f"call {n}"
            tier.close()
        again = open_tier(path, backend, slots=slots, layout=layout)
        wrong, right = wrong_blocks(again)
        assert wrong == 0 and safe <= right, f"call {n}"
        if not calls.failed:
            assert len(right) >= 17
            again.close()
            return
        put(again, again.allocate(0, 3), [900, 901, 902])  # and it can be written to again
        assert wrong_blocks(again)[0] == 0
        again.close()
    raise AssertionError("the script makes more calls than were tried")


# ---------------------------------------------------------------------- power loss
class Unsynced(SystemCalls):
    """Remembers what lay under every write since its file was last synced: a power loss may bring it back."""

    def __init__(self) -> None:
        self.lock, self.under = threading.RLock(), {}

    def boot_id(self):
        return "the boot before the loss"

    def _remember(self, fd, offset, nbytes):
        name = os.readlink(f"/proc/self/fd/{fd}")
        plain = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        before = os.pread(plain, nbytes, offset)
        os.close(plain)
        if not name.endswith(PROBE_FILE):
            self.under.setdefault(os.fstat(fd).st_ino, []).append((offset, nbytes, before))

    def pwritev(self, fd, buffers, offset):
        with self.lock:
            self._remember(fd, offset, sum(len(b) for b in buffers))
            return super().pwritev(fd, buffers, offset)

    def append(self, fd, frame):
        with self.lock:
            self._remember(fd, os.fstat(fd).st_size, len(frame))
            return super().append(fd, frame)

    def fdatasync(self, fd):
        with self.lock:
            super().fdatasync(fd)
            self.under.pop(os.fstat(fd).st_ino, None)

    def lose_power(self, path, copy, choose) -> None:
        """A copy of the store in which any part of what was not synced may be missing, pages of a write one by one."""
        with self.lock:
            shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.sock"))
            names = {file.stat().st_ino: file.relative_to(path) for file in path.rglob("*") if file.is_file()}
            for inode, writes in self.under.items():
                if inode in names:
                    self._undo(copy / names[inode], writes, choose)

    def _undo(self, file, writes, choose) -> None:
        with open(file, "r+b") as handle:
            for offset, nbytes, before in reversed(writes):
                if len(before) < nbytes:  # the file grew: it ends somewhere in between
                    handle.truncate(offset + choose.randrange(nbytes + 1) if choose.random() < 0.5 else offset)
                    continue
                for at in range(0, nbytes, 4096):
                    if choose.random() < 0.5:
                        handle.seek(offset + at)
                        handle.write(before[at : at + 4096])


def lose_power_often(path, backend, times: int, seed: int, layout=LAYOUT) -> dict[str, int]:
    choose, calls, totals = random.Random(seed), Unsynced(), {"acknowledged": 0, "lost": 0, "wrong": 0, "unsynced": 0}
    tier = open_tier(path / "s", backend, calls=calls, layout=layout)
    held, number, safe, listed = [], 0, set(), set()
    for loop in range(times):
        for _ in range(choose.randrange(1, 5)):
            if tier.free_slots(0) < 40:
                gone = np.array([held.pop(choose.randrange(len(held))) for _ in range(24)])
                keys = {stamp["key"].tobytes() for stamp in tier.stamps(0, gone)}
                safe, listed = safe - keys, listed - keys
                tier.free(0, gone)
            slots = tier.allocate(0, choose.randrange(1, 9))
            put(tier, slots, list(range(number, number + len(slots))))
            listed |= {key_of(n) for n in range(number, number + len(slots))}
            number += len(slots)
            held += slots.tolist()
            if choose.random() < 0.3:
                sources, targets = np.array(held[:4]), tier.allocate(0, len(held[:4]))
                ticket = tier.relocate(0, sources, targets)
                assert ticket.event.wait(60) and ticket.ok.all()
                tier.free(0, sources)
                held[:4] = targets.tolist()
        if choose.random() < 0.5:
            tier.flush()
            safe = set(listed)
        copy = path / f"copy{loop}"
        assert tier._writer.wait(60)  # files that are made ahead come and go
        totals["unsynced"] += bool(calls.under)
        calls.lose_power(path / "s", copy, choose)
        again = open_tier(copy, backend, layout=layout)
        wrong, right = wrong_blocks(again)
        again.close()
        shutil.rmtree(copy)
        totals["acknowledged"] += len(safe)
        totals["lost"] += len(safe - right)
        totals["wrong"] += wrong
    tier.close()
    return totals


def test_a_power_loss_takes_only_what_was_not_committed(scratch, backend, seed):
    totals = lose_power_often(scratch, backend, 60, seed)
    assert totals["acknowledged"] > 1000 and totals["unsynced"] > 5
    assert (totals["lost"], totals["wrong"]) == (0, 0), totals


def test_a_power_loss_in_writes_past_the_page_cache_takes_no_more(tmp_path, backend, seed):
    totals = lose_power_often(tmp_path, backend, 12, seed, LARGE)
    assert totals["acknowledged"] > 50 and totals["unsynced"] > 2
    assert (totals["lost"], totals["wrong"]) == (0, 0), totals


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("times", "layout"), [(3000, LAYOUT), (300, LARGE)], ids=["small", "large"])
def test_many_power_losses(tmp_path, backend, seed, times, layout):
    totals = lose_power_often(tmp_path, backend, times, seed + 1, layout)
    assert (totals["lost"], totals["wrong"]) == (0, 0), totals


def test_a_segment_that_a_power_loss_cut_short_is_made_anew(tmp_path, backend):
    """Its name and the journal reached the disk, its bytes did not: nothing in it is listed, and it takes blocks again."""
    tier = open_tier(tmp_path / "s", backend, durability="always")
    put(tier, tier.allocate(0, 30), list(range(30)))
    put(tier, tier.allocate(0, 10), list(range(30, 40)))
    assert tier._writer.wait(60)
    shutil.copytree(tmp_path / "s", tmp_path / "copy", ignore=shutil.ignore_patterns("*.sock"))
    tier.close()
    raw = (tmp_path / "copy" / "manifest.log").read_bytes()
    frames = [frame.body for frame in whole_frames(raw)]
    assert b"commit" in bytes(frames[-1])  # the process got no further than the record before it
    (tmp_path / "copy" / "manifest.log").write_bytes(raw[: len(raw) - len(frames[-1]) - 8])
    (file,) = (tmp_path / "copy" / "blocks.zarr" / "g0").glob("c.1.*")  # of both puts
    os.truncate(file, 4096)
    again = open_tier(tmp_path / "copy", backend)
    wrong, right = wrong_blocks(again)
    assert wrong == 0 and 0 < len(right) < 30 and again.recovered()[0][0].size == len(right)
    room = again.free_slots(0)
    assert room + len(right) == again.num_slots(0)
    assert put(again, again.allocate(0, room), list(range(100, 100 + room))).all()
    again.close()


# ---------------------------------------------------------------------- flipped bits
def flip_bits(path, backend, times: int, seed: int, codec: str = "none", layout=LAYOUT) -> None:
    """One random bit at a time, in data, trailers, index, journal and identity; each is noticed or harmless padding."""
    choose = random.Random(seed)
    tier = open_tier(path, backend, codec=codec, layout=layout)
    put(tier, tier.allocate(0, 30), list(range(30)))
    tier.put_session("a", {"n": 1})
    geometry = tier.geometry(0)
    ends = (tier.stamps(0, np.arange(30))["stored_bytes"] + geometry.proof_bytes - CRC_BYTES).tolist()
    tier.close()
    segments = sorted((path / "blocks.zarr" / "g0").glob("c.*"))[
        : -(-30 // geometry.slots_per_segment)
    ]  # not clean ones
    sizes = {segment: segment.stat().st_size for segment in segments}
    meta = [path / "manifest.log", path / "store.json", *sorted((path / "blocks.zarr").rglob("zarr.json"))]
    sizes |= {file: file.stat().st_size for file in meta}
    pristine = {file: file.read_bytes() for file in sizes}
    everything, torn, is_noticed = listed_right(path, backend, layout)
    assert len(everything) == 30 and torn == 0 and not is_noticed
    weights = [6 / len(segments)] * len(segments) + [3, 1] + [1 / (len(meta) - 2)] * (len(meta) - 2)
    for _ in range(times):
        file = choose.choices(list(sizes), weights=weights)[0]
        at = choose.randrange(sizes[file])
        raw = bytearray(pristine[file])
        raw[at] ^= 1 << choose.randrange(8)
        with open(file, "r+b") as handle:  # in place: the file keeps its inode
            handle.write(raw)
        number = segments.index(file) if file in segments else -1
        part = part_of_segment(geometry, ends, number, at) if number >= 0 else "metadata"
        is_journal = file.suffix == ".log"
        is_same = file.suffix == ".json" and means_the_same(bytes(raw), pristine[file])
        try:
            right, torn, is_noticed = listed_right(path, backend, layout)
            assert torn == (part == "index") and is_noticed == is_journal, f"{file.name} at {at}"
            kept = right == everything
            assert kept == (part in ("index", "nothing") or is_same) or is_journal, f"{file.name} at {at}"
        except KvTierError:
            assert part == "metadata" and not is_same
        for one, whole in pristine.items():
            with open(one, "r+b") as handle:
                handle.write(whole)
                handle.truncate()
    assert listed_right(path, backend, layout) == (everything, 0, False)


def part_of_segment(geometry, ends: list[int], number: int, at: int) -> str:
    """What a byte of a segment file belongs to, where the first slots hold blocks that end, trailer and all, there.

    The last file, made ahead, holds none: it is made anew when a put finds it spoiled.
    """
    if number * geometry.slots_per_segment >= len(ends):
        return "nothing"
    if at < geometry.header_bytes:
        return "index" if at < 16 * geometry.slots_per_segment + 4 else "nothing"
    slot, where = divmod(at - geometry.header_bytes, geometry.stride)
    slot += number * geometry.slots_per_segment
    return "block" if slot < len(ends) and where < ends[slot] else "nothing"


def means_the_same(raw: bytes, before: bytes) -> bool:
    """White space may flip."""
    try:
        return json.loads(raw) == json.loads(before)
    except ValueError:
        return False


def listed_right(path, backend, layout) -> tuple[set[bytes], int, bool]:
    """Keys of the blocks that are right, how many broken indexes were noticed, and whether the journal was damaged."""
    tier = open_tier(path, backend, durability="none", layout=layout)
    try:
        wrong, right = wrong_blocks(tier)
        assert wrong == 0
        right = right if tier.sessions() == {"a": {"n": 1}} else set()
    finally:
        tier.close()
    status = tier.status()
    return right, status["torn_indexes"], bool(status["journal_gaps"] or status["torn_journal_bytes"])


def test_flipped_bits_are_misses_or_refusals_and_never_wrong_bytes(scratch, backend, seed):
    flip_bits(scratch / "s", backend, 2000, seed)


def test_flipped_bits_of_blocks_past_the_page_cache_are_noticed_too(tmp_path, backend, seed):
    flip_bits(tmp_path / "s", backend, 60, seed, layout=LARGE)


def test_flipped_bits_of_a_compressed_store_are_noticed_too(scratch, backend, seed):
    flip_bits(scratch / "s", backend, 150, seed, "lz4")


def test_flipped_bits_of_a_rounded_store_are_noticed_too(scratch, backend, seed):
    flip_bits(scratch / "s", backend, 30, seed, "int4")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("times", "codec"), [(50_000, "none"), (2000, "lz4"), (500, "int4")])
def test_many_flipped_bits(tmp_path, backend, seed, times, codec):
    flip_bits(tmp_path / "s", backend, times, seed + 1, codec)
