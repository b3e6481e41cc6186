"""The file of the segment that is filled next is made before a put needs it, and never in the way of one that needs it now."""

from __future__ import annotations

import errno
import sys
import threading
from pathlib import Path

import pytest

from kvtier.tiers.nvme.files import SegmentFiles
from kvtier.tiers.nvme.identity import AHEAD_SEGMENT_FILE

sys.path.insert(0, str(Path(__file__).parent.parent / "faults"))
from blocks_of import SystemCalls, key_of, open_tier, put, wrong_blocks


class Making(SystemCalls):
    """Says which thread makes segment files, under which name; may refuse, or hold, those made ahead."""

    def __init__(self, *, refuses: bool = False, gate: threading.Event | None = None) -> None:
        self.refuses, self.gate, self.began = refuses, gate, threading.Event()
        self.ahead_fds: set[int] = set()

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        if path.name == AHEAD_SEGMENT_FILE:
            self.ahead_fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self.ahead_fds.discard(fd)
        super().close(fd)

    def fallocate(self, fd: int, size: int) -> None:
        if fd in self.ahead_fds:
            self.began.set()
            if self.gate is not None:
                assert self.gate.wait(60)
            if self.refuses:
                raise OSError(errno.ENOSPC, "no room for what nobody needs yet")
        super().fallocate(fd, size)


def made_in_puts(monkeypatch) -> list[tuple[int, int]]:
    """Segments whose file a put had to make itself, from now on."""
    found: list[tuple[int, int]] = []
    make = SegmentFiles._make

    def noted(self, segment, path, flags):
        found.append(segment)
        return make(self, segment, path, flags)

    monkeypatch.setattr(SegmentFiles, "_make", noted)
    return found


def segment_files(path: Path) -> list[int]:
    return sorted(int(file.name.split(".")[1]) for file in (path / "blocks.zarr" / "g0").glob("c.*"))


def test_only_the_first_segment_is_made_by_a_put(tmp_path, backend, monkeypatch):
    in_puts = made_in_puts(monkeypatch)
    tier = open_tier(tmp_path / "s", backend)
    size = tier.geometry(0).slots_per_segment
    for first in range(0, 3 * size, 8):
        assert put(tier, tier.allocate(0, 8), list(range(first, first + 8))).all()
        assert tier._writer.wait(60)
    assert in_puts == [(0, 0)] and segment_files(tmp_path / "s") == [0, 1, 2, 3]
    tier.flush()
    tier.close()
    again = open_tier(tmp_path / "s", backend)
    assert wrong_blocks(again) == (0, {key_of(n) for n in range(3 * size)})
    again.close()


def test_a_put_that_needs_the_file_at_once_does_not_wait_for_it(tmp_path, backend, monkeypatch):
    """And the file that it made, with a block in it, is not replaced by the empty one."""
    in_puts, calls = made_in_puts(monkeypatch), Making(gate=threading.Event())
    tier = open_tier(tmp_path / "s", backend, calls=calls)
    size = tier.geometry(0).slots_per_segment
    first = tier.allocate(0, size)
    stuck = threading.Thread(target=lambda: put(tier, first, list(range(size))))
    stuck.start()
    assert calls.began.wait(60)
    assert put(tier, tier.allocate(0, 4), list(range(size, size + 4))).all()  # in the segment that is being made ahead
    calls.gate.set()
    stuck.join()
    assert sorted(in_puts) == [(0, 0), (0, 1)]
    assert tier._writer.wait(60)
    tier.flush()
    assert wrong_blocks(tier) == (0, {key_of(n) for n in range(size + 4)})
    assert not (tmp_path / "s" / AHEAD_SEGMENT_FILE).exists()
    tier.close()


def test_a_disk_that_has_no_room_for_it_refuses_nothing_that_is_needed(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend, calls=Making(refuses=True))
    size = tier.geometry(0).slots_per_segment
    assert put(tier, tier.allocate(0, 2 * size), list(range(2 * size))).all()
    assert tier._writer.wait(60) and tier.last_write_error is None
    tier.close()


def test_a_full_store_makes_nothing_ahead(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    count = tier.num_slots(0)
    assert put(tier, tier.allocate(0, count), list(range(count))).all()
    assert tier._writer.wait(60)
    assert segment_files(tmp_path / "s") == list(range(tier.num_segments(0)))
    tier.close()


@pytest.mark.parametrize("left", [b"", b"half"])
def test_what_a_killed_process_left_of_it_is_no_obstacle(tmp_path, backend, left):
    (tmp_path / "s").mkdir(mode=0o700)
    (tmp_path / "s" / AHEAD_SEGMENT_FILE).write_bytes(left)
    tier = open_tier(tmp_path / "s", backend)
    assert put(tier, tier.allocate(0, 8), list(range(8))).all() and tier._writer.wait(60)
    assert segment_files(tmp_path / "s") == [0, 1]
    tier.close()


def test_one_that_was_spoiled_before_its_use_is_made_anew(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    assert put(tier, tier.allocate(0, 8), list(range(8))).all() and tier._writer.wait(60)
    tier.close()
    ahead = next((tmp_path / "s" / "blocks.zarr" / "g0").glob("c.1.*"))
    raw = bytearray(ahead.read_bytes())
    raw[5] ^= 4
    ahead.write_bytes(raw)
    again = open_tier(tmp_path / "s", backend)
    count = 2 * again.geometry(0).slots_per_segment
    assert put(again, again.allocate(0, count - 8), list(range(8, count))).all()
    again.flush()
    again.close()
    last = open_tier(tmp_path / "s", backend)
    assert wrong_blocks(last) == (0, {key_of(n) for n in range(count)}) and last.status()["torn_indexes"] == 0
    last.close()
