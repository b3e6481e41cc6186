"""A store whose files are damaged, replaced or refused while it is open or between two openings: what is right is kept, what
is not is counted, and nothing that was acknowledged hangs on one refused call."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest

from kvtier.tiers.errors import TierUnavailableError
from kvtier.tiers.nvme import journal, maintenance, manifest
from kvtier.tiers.nvme.journal import framed, whole_frames
from kvtier.tiers.nvme.manifest import Manifest, replay

sys.path.insert(0, str(Path(__file__).parent.parent / "faults"))
from blocks_of import SystemCalls, key_of, open_tier, put, wrong_blocks


class Refusing(SystemCalls):
    """Refuses one kind of call on files of one name, so many times. `asked` counts the calls by kind and name."""

    def __init__(self, call: str = "", name: str = "", times: int = 0) -> None:
        self.call, self.name, self.times, self.asked = call, name, times, {}

    def _ask(self, call: str, file: str | Path | int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file).name
        self.asked[call, name] = self.asked.get((call, name), 0) + 1
        if self.times and (call, name) == (self.call, self.name):
            self.times -= 1
            raise OSError(errno.EIO, f"injected into {call} of {name}")

    def open(self, path, flags):
        self._ask("open", path)
        return super().open(path, flags)

    def append(self, fd, frame):
        self._ask("append", fd)
        return super().append(fd, frame)

    def fdatasync(self, fd):
        self._ask("fdatasync", fd)
        super().fdatasync(fd)

    def replace(self, source, target):
        self._ask("replace", target)
        super().replace(source, target)

    def sync_directory(self, path):
        self._ask("sync_directory", path)
        super().sync_directory(path)


class Rebooted(SystemCalls):
    def boot_id(self) -> str:
        return "another boot"


def opened(path, backend, **options):
    """Nothing is committed that nobody asks for."""
    tier = open_tier(path, backend, **options)
    if tier._committer is not None:
        tier._committer.close()
        tier._committer = None
    return tier


def crashed(path: Path) -> Path:
    """The store as a process that ends now would leave it."""
    copy = path.with_name(f"{path.name}+")
    shutil.copytree(path, copy)
    return copy


def right_numbers(path, backend, count: int, **options) -> set[int]:
    tier = open_tier(path, backend, **options)
    try:
        wrong, right = wrong_blocks(tier)
        assert wrong == 0
        return {n for n in range(count) if key_of(n) in right}
    finally:
        tier.close()


# ---------------------------------------------------------------------- refused calls
def test_what_a_commit_could_not_write_down_is_settled_by_the_next(tmp_path, backend):
    calls = Refusing()
    tier = opened(tmp_path / "s", backend, calls=calls)
    put(tier, tier.allocate(0, 12), list(range(12)))
    calls.call, calls.name, calls.times = "append", "manifest.log", 1
    with pytest.raises(TierUnavailableError, match="may not last"):
        tier.flush()
    assert calls.times == 0
    tier.flush()
    assert right_numbers(crashed(tmp_path / "s"), backend, 12, calls=Rebooted()) == set(range(12))
    tier.close()


@pytest.mark.parametrize("call", ["open", "append", "fdatasync", "replace", "sync_directory"])
def test_a_snapshot_that_finds_no_room_is_put_off_and_costs_no_commit(tmp_path, backend, monkeypatch, caplog, call):
    monkeypatch.setattr(manifest, "SNAPSHOT_BYTES", 4000)
    path, calls = tmp_path / "s", Refusing()
    tier = opened(path, backend, calls=calls)
    kept = tier.allocate(0, 8)
    put(tier, kept, list(range(8)))

    def history() -> None:
        for i in range(12):
            slots = tier.allocate(0, 8)
            put(tier, slots, list(range(100 + 8 * i, 108 + 8 * i)))
            tier.free(0, slots)

    history()
    snapshot = "s" if call == "sync_directory" else "manifest.log" if call == "replace" else "manifest.new"
    calls.call, calls.name, calls.times, before = call, snapshot, 1, calls.asked.copy()
    with caplog.at_level(logging.WARNING, "kvtier.nvme"):
        tier.flush()
    assert calls.times == 0 and "event=no_snapshot" in caplog.text and not (path / "manifest.new").exists()
    put(tier, tier.allocate(0, 1), [8])
    tier.flush()
    tries = calls.asked["open", "manifest.new"] - before.get(("open", "manifest.new"), 0)
    assert tries == (
        2 if call == "sync_directory" else 1
    )  # a rename that may be undone is made again, a refusal put off
    assert right_numbers(crashed(path), backend, 9, calls=Rebooted()) == set(range(9))
    history()
    tier.flush()
    assert (path / "manifest.log").stat().st_size < 4000
    tier.close()
    assert right_numbers(path, backend, 9) == set(range(9))


# ---------------------------------------------------------------------- a damaged journal
def filled(path, backend, count: int = 20) -> None:
    """A store with a frame for each block, committed and closed."""
    tier = opened(path, backend)
    for number in range(count):
        put(tier, tier.allocate(0, 1), [number])
    tier.put_session("a", {"n": 1})
    tier.flush()
    tier.close()


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def frame_of(path: Path, number: int) -> tuple[int, int]:
    """Where the frame that lists a block lies."""
    frames = whole_frames((path / "manifest.log").read_bytes())
    (found,) = [frame for frame in frames if key_of(number) in bytes(frame.body)]
    return found.start, found.end


def contents(path: Path) -> dict[str, bytes]:
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    del files["LOCK"]  # says who looks
    return files


@pytest.mark.parametrize("where", ["length", "sum", "body"])
@pytest.mark.parametrize("calls", [SystemCalls(), Rebooted()])
def test_a_flipped_bit_of_the_journal_costs_what_its_frame_listed_and_is_told(tmp_path, backend, caplog, where, calls):
    path = tmp_path / "s"
    filled(path, backend)
    start, end = frame_of(path, 2)
    flip(path / "manifest.log", {"length": start, "sum": start + 4, "body": end - 3}[where])
    damaged = contents(path)
    report = maintenance.check(path, lambda done, total: None)
    assert (report.journal_gaps, report.blocks, report.bad_blocks, report.sessions) == (1, 19, 0, 1)
    assert report.is_damaged and contents(path) == damaged
    with caplog.at_level(logging.ERROR, "kvtier.nvme"):
        tier = open_tier(path, backend, calls=calls)
    assert tier.status()["journal_gaps"] == 1 and "event=journal_damaged" in caplog.text
    assert (path / "manifest.damaged").read_bytes() == damaged["manifest.log"]
    wrong, right = wrong_blocks(tier)
    assert wrong == 0 and right == {key_of(n) for n in range(20) if n != 2} and tier.sessions() == {"a": {"n": 1}}
    assert put(tier, tier.allocate(0, 4), [2, 30, 31, 32]).all()
    tier.close()
    report = maintenance.check(path, lambda done, total: None)
    assert (report.journal_gaps, report.blocks, report.is_damaged) == (0, 23, False)


def test_repair_mends_the_journal_and_says_that_it_was_damaged(tmp_path, backend):
    filled(tmp_path / "s", backend)
    flip(tmp_path / "s" / "manifest.log", frame_of(tmp_path / "s", 2)[1] - 1)
    assert maintenance.check(tmp_path / "s", lambda done, total: None, repair=True).journal_gaps == 1
    assert not maintenance.check(tmp_path / "s", lambda done, total: None).is_damaged


def test_a_journal_that_cannot_be_mended_is_used_as_it_is(tmp_path, backend):
    path = tmp_path / "s"
    filled(path, backend)
    flip(path / "manifest.log", frame_of(path, 2)[1] - 1)
    refusing = Refusing("open", "manifest.new", 2)  # the copy, then the snapshot
    assert len(right_numbers(path, backend, 20, calls=refusing)) == 19 and refusing.times == 0
    tier = open_tier(path, backend)
    assert tier.status()["journal_gaps"] == 1 and len(tier.recovered()[0][0]) == 19
    tier.close()


def test_a_block_whose_slot_was_given_to_another_by_a_lost_frame_is_a_miss(tmp_path, backend):
    path = tmp_path / "s"
    tier = opened(path, backend)
    slots = tier.allocate(0, 4)
    put(tier, slots, list(range(4)))
    tier.flush()
    before = (path / "manifest.log").stat().st_size
    tier.free(0, slots[1:2])
    put(tier, slots[1:2], [9])
    lost = [frame for frame in whole_frames((path / "manifest.log").read_bytes()) if frame.start >= before]
    assert len(lost) == 2  # a drop and a put
    tier.flush()
    tier.close()
    for frame in lost:
        flip(path / "manifest.log", frame.end - 1)
    tier = open_tier(path, backend)
    assert tier.recovered()[0][0].tolist() == slots.tolist()
    assert wrong_blocks(tier) == (0, {key_of(0), key_of(2), key_of(3)})
    tier.close()


class Boot(SystemCalls):
    def __init__(self, name: str) -> None:
        self.name = name

    def boot_id(self) -> str:
        return self.name


def test_after_a_power_loss_nothing_behind_a_gap_is_believed_that_was_not_synced(tmp_path):
    """Pages that were never synced are lost one by one: what is whole behind a lost one may take back what was promised."""
    path, calls = tmp_path / "manifest.log", Boot("first")
    log = Manifest.open(path, calls)
    log.begin_boot("first")
    for name in ("a", "b", "c"):
        log.put_session(name, {"n": 1})
    log.sync()
    log.commit()  # says that a, b and c are synced
    log.put_session("d", {"n": 1})
    log.drop_session("a")
    os.close(log._fd)
    starts = {bytes(frame.body): frame.start for frame in whole_frames(path.read_bytes())}

    def replayed_without(name: str, boot: str) -> tuple[set[str], int]:
        (start,) = [
            start for body, start in starts.items() if b"\xa7session" in body and b"id\xa1" + name.encode() in body
        ]
        raw = path.read_bytes()
        flip(path, start + 9)
        found = replay(path, Boot(boot))
        path.write_bytes(raw)
        return set(found.listing.sessions), found.gaps

    assert replayed_without("b", "first") == ({"c", "d"}, 1)  # no power loss: what is broken is damage
    assert replayed_without("d", "first") == ({"b", "c"}, 1)
    assert replayed_without("b", "second") == ({"c", "d"}, 1)  # it was synced
    assert replayed_without("d", "second") == ({"a", "b", "c"}, 1)  # it was not


def test_what_only_looks_like_frames_is_not_taken_for_one_and_holds_nobody_up(monkeypatch):
    whole, looked_at = framed({"op": "session", "id": "a", "record": {}}), []
    monkeypatch.setattr(journal, "_MAX_LOOKED_AT", 1 << 20)
    monkeypatch.setattr(journal.crc32c, "crc32c", lambda body: looked_at.append(len(body)) or 0)  # no sum is right
    bait = (b"\xff\xff\0\0" + b"\1" * 4 + b"\x83\xa2op") * 20_000  # lengths that fit
    assert list(whole_frames(bait + whole)) == []
    assert 1 << 20 < sum(looked_at) < 1 << 21


def test_a_journal_whose_sync_was_refused_is_written_anew_by_the_process_after(tmp_path):
    """The kernel forgets pages that it could not write: a later sync says yes, and a power loss takes them."""
    path = tmp_path / "manifest.log"
    first = Manifest.open(path, Refusing("fdatasync", "manifest.log", 1))
    first.put_session("s", {"token_ids": [1]})
    with pytest.raises(OSError, match="injected"):
        first.sync()
    os.close(first._fd)  # killed before it could write the journal anew
    second = Manifest.open(path)
    assert "s" in second.listing.sessions
    before = path.stat().st_ino
    second.sync()
    assert path.stat().st_ino != before, "pages that nobody writes any more were taken for synced"
    second.close()
    third, before = Manifest.open(path), path.stat().st_ino
    third.put_session("t", {"token_ids": [2]})
    third.sync()
    assert path.stat().st_ino == before, "a journal that was closed in order was written anew"
    third.close()
    assert set(replay(path).listing.sessions) == {"s", "t"} and replay(path).is_closed
