"""The store's calls to the kernel under a seed: failing, short and torn ones, a process killed in any of them, and a
power loss that takes back what was not synced.

What a sync refused stays in doubt for ever, as on Linux: a later sync that succeeds does not write those pages. Not
simulated: names (renames of files count as durable at once; a segment that was never synced may be missing).
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

from sim_events import Trace

from kvtier.tiers.nvme.calls import SystemCalls
from kvtier.tiers.nvme.identity import NEW_SEGMENT_FILE, PROBE_FILE

PAGE = 4096


class Killed(BaseException):
    """The process ends here; nothing of it runs any more."""


class Unsynced:
    """What lies on the medium under each written page, by inode, until a sync. Outlives processes."""

    def __init__(self) -> None:
        self.under: dict[int, dict[int, bytes]] = {}
        self.doomed: dict[int, dict[int, bytes]] = {}  # a sync of these was refused
        self.synced_size: dict[int, int] = {}
        self.unborn: set[int] = set()  # segments whose first sync is still to come
        self.boots = 0

    def made(self, inode: int, *, is_segment: bool) -> None:
        """A new file, perhaps under the number of one that is gone."""
        for pages in (self.under, self.doomed):
            pages.pop(inode, None)
        self.synced_size[inode] = 0
        if is_segment:
            self.unborn.add(inode)

    def remember(self, fd: int, offset: int, nbytes: int) -> None:
        stat = os.fstat(fd)
        inode = stat.st_ino
        self.synced_size.setdefault(inode, stat.st_size)
        under, doomed = self.under.setdefault(inode, {}), self.doomed.get(inode, {})
        plain = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            for page in range(offset // PAGE, -(-(offset + nbytes) // PAGE)):
                if page not in under:
                    under[page] = doomed.pop(page) if page in doomed else os.pread(plain, PAGE, page * PAGE)
        finally:
            os.close(plain)

    def synced(self, fd: int, *, refused: bool) -> None:
        stat = os.fstat(fd)
        pages = self.under.pop(stat.st_ino, {})
        if refused:
            self.doomed.setdefault(stat.st_ino, {}).update(pages)
        else:
            self.unborn.discard(stat.st_ino)
            if not self.doomed.get(stat.st_ino):
                self.synced_size[stat.st_ino] = stat.st_size

    def lose_power(self, root: Path, choose: random.Random) -> int:
        """Take back any part of what is not on the medium, page by page. Returns how many pages went."""
        taken = 0
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            inode = path.stat().st_ino
            if inode in self.unborn and choose.random() < 0.5:
                path.unlink()
                continue
            pages = self.doomed.get(inode, {}) | self.under.get(inode, {})
            if pages:
                taken += self._take_back(path, inode, pages, choose)
        boots = self.boots
        self.__init__()  # type: ignore[misc]
        self.boots = boots + 1
        return taken

    def _take_back(self, path: Path, inode: int, pages: dict[int, bytes], choose: random.Random) -> int:
        taken, size = 0, path.stat().st_size
        with open(path, "r+b") as file:
            for page in sorted(pages):
                if choose.random() < 0.5 and page * PAGE < size:
                    taken += 1
                    file.seek(page * PAGE)
                    file.write(pages[page].ljust(min(PAGE, size - page * PAGE), b"\0"))
            known = self.synced_size.get(inode, size)
            if known < size:  # it has grown: it ends somewhere in between
                file.truncate(choose.randint(known, size))
        return taken


class SimulatedDisk(SystemCalls):
    """One process's calls. `faults` is the share of calls that fail; `kill_in` counts down to the last one."""

    def __init__(self, choose: random.Random, trace: Trace, unsynced: Unsynced, faults: float) -> None:
        self._choose, self._trace, self._unsynced = choose, trace, unsynced
        self.faults = faults
        self.kill_in: int | None = None
        self.is_dead = False
        self._names: dict[int, str] = {}
        self.failed: dict[str, int] = {}

    def die(self) -> None:
        """Close what the process had open, as the kernel does."""
        self.is_dead = True
        for fd in self._names:
            os.close(fd)
        self._names.clear()

    # ------------------------------------------------------------------ the calls
    def boot_id(self) -> str:
        return f"boot {self._unsynced.boots}"

    def open(self, path: Path, flags: int) -> int:
        self._may_fail("open", path.name)
        fd = super().open(path, flags)
        self._names[fd] = path.name
        if flags & os.O_EXCL or path.name == NEW_SEGMENT_FILE:
            self._unsynced.made(os.fstat(fd).st_ino, is_segment=path.name == NEW_SEGMENT_FILE)
        return fd

    def close(self, fd: int) -> None:
        if not self.is_dead:  # the dead have nothing open
            self._trace.event("io", f"close {self._names.pop(fd)}")
            super().close(fd)

    def preadv(self, fd, buffers, offset):
        fate = self._may_fail("preadv", self._names.get(fd), offset)
        done = super().preadv(fd, buffers, offset)
        return done // 2 if fate == "short" else done

    def pwritev(self, fd, buffers, offset):
        nbytes = sum(len(memoryview(b).cast("B")) for b in buffers)
        if self._names.get(fd) == PROBE_FILE:
            return super().pwritev(fd, buffers, offset)
        write = lambda part: self._write_part(fd, buffers, part, offset)  # noqa: E731
        fate = self._may_fail("pwritev", self._names.get(fd), offset, tear=lambda: write(nbytes // 2))
        if fate == "short":
            return write(nbytes // 2)
        self._unsynced.remember(fd, offset, nbytes)
        return super().pwritev(fd, buffers, offset)

    def append(self, fd, frame):
        write = lambda part: self._append_part(fd, frame, part)  # noqa: E731
        fate = self._may_fail("append", self._names.get(fd), len(frame), tear=lambda: write(len(frame) // 2))
        return write(max(1, len(frame) // 2) if fate == "short" else len(frame))

    def fdatasync(self, fd):
        try:
            self._may_fail("fdatasync", self._names.get(fd))
        except OSError:
            self._unsynced.synced(fd, refused=True)
            raise
        self._unsynced.synced(fd, refused=False)

    def fallocate(self, fd, size):
        self._may_fail("fallocate", self._names.get(fd))
        super().set_size(fd, size)  # what is not written takes no memory where the folder is one

    def set_size(self, fd, size):
        self._may_fail("set_size", self._names.get(fd))
        super().set_size(fd, size)

    def replace(self, source, target):
        self._may_fail("replace", target.name)
        super().replace(source, target)

    def sync_directory(self, path):
        self._may_fail("sync_directory", path.name)  # names count as durable at once

    def next_byte(self, fd, offset):
        self._may_fail("next_byte", self._names.get(fd))
        return super().next_byte(fd, offset)

    def punch(self, fd, offset, size):
        self._may_fail("punch", self._names.get(fd))
        self._unsynced.remember(fd, offset, size)
        super().punch(fd, offset, size)

    # ------------------------------------------------------------------ inside
    def _may_fail(self, call: str, *said: object, tear: Callable[[], object] | None = None) -> str:
        """ "ok" or "short"; raises OSError or Killed. `tear` does half of what was asked."""
        if self.is_dead:
            raise Killed
        self._trace.event("io", f"{call} {said}")
        if self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in <= 0:
                if tear is not None and self._choose.random() < 0.5:
                    tear()
                self.is_dead = True
                raise Killed
        if self._choose.random() >= self.faults:
            return "ok"
        self.failed[call] = self.failed.get(call, 0) + 1
        how = self._choose.choice(["EIO", "EIO", "ENOSPC", "short", "torn"])
        self._trace.event("io", f"{how} in {call}")
        if how == "torn" and tear is not None:
            tear()
        if how == "short" and call in ("preadv", "pwritev", "append"):
            return "short"
        raise OSError(errno.ENOSPC if how == "ENOSPC" else errno.EIO, f"injected {how}")

    def _write_part(self, fd: int, buffers, nbytes: int, offset: int) -> int:
        self._unsynced.remember(fd, offset, nbytes)
        whole = b"".join(bytes(b) for b in buffers)
        plain = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)  # half a page does not go past the page cache
        try:
            return os.pwrite(plain, whole[:nbytes], offset)
        finally:
            os.close(plain)

    def _append_part(self, fd: int, frame: memoryview, nbytes: int) -> int:
        self._unsynced.remember(fd, os.fstat(fd).st_size, nbytes)
        return super().append(fd, frame[:nbytes])
