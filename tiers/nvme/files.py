"""Segment files: open, preallocated or sparse, read and written past the page cache where the file system allows it.

Buffers that the kernel reads into or writes from are page aligned; whoever has others goes through a worker's own
scratch buffer. Guards: a file of another size or with an index that is not ours was rewritten by somebody else, and
nothing in it is trusted; neither is what went to a file that has lost its name since.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..layout import KVLayout
from ..streams import IntArray, Rows, aligned_rows
from .calls import SystemCalls
from .identity import AHEAD_SEGMENT_FILE, NEW_SEGMENT_FILE, PROBE_FILE, segment_path
from .layout import PAGE_BYTES, Geometry

MAX_OPEN_FILES = 512
DIRECT_MIN_BYTES = 256 << 10  # smaller blocks are many requests: the page cache then saves more than its copy costs
Segment = tuple[int, int]  # layer group, number
_LOG = logging.getLogger("kvtier.nvme")


class ForeignSegmentError(OSError):
    """A segment that is not as we left it; its blocks are not to be trusted."""


@dataclass(slots=True)
class _Open:
    fd: int
    users: int = 0
    is_over: bool = False  # the last user closes it


class SegmentFiles:
    """The segments of one store. Descriptors are kept open, up to a limit, and shared by all workers."""

    def __init__(
        self,
        root: Path,
        layouts: Sequence[KVLayout],
        geometries: Sequence[Geometry],
        calls: SystemCalls,
        *,
        direct: bool = True,
    ) -> None:
        self._root, self._layouts, self._geometries, self.calls = root, layouts, geometries, calls
        self._lock = threading.Lock()
        self._open: OrderedDict[Segment, _Open] = OrderedDict()
        self._grown: set[Path] = set()  # directories that took a new file since they were last synced
        self._ahead = threading.Lock()  # one segment at a time is made ahead
        self.torn: set[Segment] = set()  # their index has to be written anew; whoever does takes them out
        self.is_direct = direct and _takes_direct(root, calls)
        if direct and not self.is_direct and any(each.block_bytes >= DIRECT_MIN_BYTES for each in geometries):
            _LOG.warning("event=no_direct_io path=%s: this file system refuses it, the page cache is used", root)

    def path(self, segment: Segment) -> Path:
        group, number = segment
        return segment_path(self._root, self._layouts[group], group, number)

    def bypasses_cache(self, group: int) -> bool:
        """Whether blocks of this group go past the page cache."""
        return self.is_direct and self._geometries[group].block_bytes >= DIRECT_MIN_BYTES

    @contextmanager
    def use(
        self, segment: Segment, *, create: bool = False, is_empty: bool = False, check_index: bool = True
    ) -> Iterator[int]:
        """A descriptor of the segment; with `create` it is made and preallocated where there is none.

        `is_empty` says that nothing is listed in it: what is there then, foreign or half made, is made anew. Raises OSError.
        """
        with self._lock:
            held = self._open.get(segment)
            if held is None:
                held = self._open[segment] = _Open(self._open_file(segment, create, is_empty, check_index))
            self._open.move_to_end(segment)
            held.users += 1
            self._close_idle(MAX_OPEN_FILES)
        try:
            yield held.fd
        finally:
            with self._lock:
                held.users -= 1
                if held.is_over and not held.users:
                    self.calls.close(held.fd)

    def make_ahead(self, segment: Segment) -> None:
        """Make the file that puts will fill next, beside those that are under way, so that none of them waits for it.

        Where that fails nothing is said: the put that needs the file will try itself.
        """
        path = self.path(segment)
        if path.exists() or not self._ahead.acquire(blocking=False):
            return
        try:
            spare = self._root / AHEAD_SEGMENT_FILE
            fd = self._make_as(spare, segment, self._flags(segment[0]))
            self.calls.close(fd)
            with self._lock:
                if path.exists():  # a put was faster
                    spare.unlink()
                else:
                    self.calls.replace(spare, path)
                    self._grown.add(path.parent)
        except OSError as error:
            _LOG.debug("event=no_segment_ahead segment=%s error=%s", path.name, error)
        finally:
            self._ahead.release()

    def write_index(self, segment: Segment, stored: npt.NDArray[np.uint64]) -> None:
        """Say in the shard's index which of its slots hold blocks, by their stored bytes."""
        with self.use(segment, check_index=False) as fd:  # whatever was there, this is what it should say
            self._write_header(segment, fd, stored)

    def punch(self, segment: Segment, start: int, end: int) -> None:
        """Give the disk under a part of a segment back, if any is there. Where that cannot be done, nothing changes."""
        if start >= end:
            return
        try:
            with self.use(segment) as fd:
                if self.calls.next_byte(fd, start) < end:  # looking is cheap, punching stops other writers of the file
                    self.calls.punch(fd, start, end - start)
        except OSError:  # nothing behind the start, or a file system that cannot
            pass

    def sync(self, segment: Segment) -> None:
        """What was written to the segment survives a power loss once this returns, and so does its name.

        Raises ForeignSegmentError where the name is gone or another file's: nobody will find what was written.
        """
        with self.use(segment) as fd:
            self.calls.fdatasync(fd)
            if not self._has_its_name(segment, fd):
                raise ForeignSegmentError(errno.ESTALE, f"{self.path(segment).name} was replaced while it was in use")
        folder = self.path(segment).parent
        with self._lock:
            is_grown = folder in self._grown
            self._grown.discard(folder)
        if is_grown:
            try:
                self.calls.sync_directory(folder)
            except OSError:
                self._grown.add(folder)
                raise

    def forget(self, segment: Segment) -> None:
        """Let go of the segment's descriptor, so that the next use opens and checks the file again."""
        with self._lock:
            held = self._open.pop(segment, None)
            if held is not None:
                held.is_over = True
                if not held.users:
                    self.calls.close(held.fd)

    def close(self) -> None:
        with self._lock:
            self._close_idle(0)

    # ------------------------------------------------------------------ inside
    def _close_idle(self, limit: int) -> None:
        for segment in list(self._open):
            if len(self._open) <= limit:
                return
            if not self._open[segment].users:
                self.calls.close(self._open.pop(segment).fd)

    def _open_file(self, segment: Segment, create: bool, is_empty: bool, check_index: bool) -> int:
        path, flags = self.path(segment), self._flags(segment[0])
        try:
            fd = self.calls.open(path, flags)
        except FileNotFoundError:
            if not create:
                raise
            return self._make(segment, path, flags)
        try:
            self._check(segment, fd, check_index)
        except BaseException as error:
            self.calls.close(fd)
            if create and is_empty and isinstance(error, ForeignSegmentError):
                return self._make(segment, path, flags)
            raise
        return fd

    def _flags(self, group: int) -> int:
        return os.O_RDWR | (os.O_DIRECT if self.bypasses_cache(group) else 0)

    def _make(self, segment: Segment, path: Path, flags: int) -> int:
        new = self._root / NEW_SEGMENT_FILE
        fd = self._make_as(new, segment, flags)
        try:
            self.calls.replace(new, path)
        except BaseException:
            self.calls.close(fd)
            new.unlink(missing_ok=True)
            raise
        self._grown.add(path.parent)
        return fd

    def _make_as(self, spare: Path, segment: Segment, flags: int) -> int:
        """Under another name until it is whole: who is killed meanwhile leaves no half segment. Raises OSError."""
        geometry = self._geometries[segment[0]]
        spare.unlink(missing_ok=True)
        fd = self.calls.open(spare, flags | os.O_CREAT)
        try:
            reserve = self.calls.set_size if geometry.is_encoded else self.calls.fallocate
            reserve(fd, geometry.segment_bytes)
            self._write_header(segment, fd, np.zeros(geometry.slots_per_segment, np.uint64))
        except BaseException:
            self.calls.close(fd)
            spare.unlink(missing_ok=True)
            raise
        return fd

    def _has_its_name(self, segment: Segment, fd: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path(segment)), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _write_header(self, segment: Segment, fd: int, stored: npt.NDArray[np.uint64]) -> None:
        geometry = self._geometries[segment[0]]
        pages = aligned_rows(1, geometry.header_bytes)
        pages[0] = np.frombuffer(geometry.header(stored), np.uint8)
        if self.calls.pwritev(fd, [pages[0].data], 0) != geometry.header_bytes:
            raise OSError(errno.EIO, f"index of {self.path(segment).name} was written in part")

    def _check(self, segment: Segment, fd: int, check_index: bool) -> None:
        """Raises ForeignSegmentError when size or index show another writer's hand."""
        geometry = self._geometries[segment[0]]
        if os.fstat(fd).st_size != geometry.segment_bytes:
            raise ForeignSegmentError(errno.EINVAL, f"{self.path(segment).name} has another size than we gave it")
        if not check_index:
            return
        pages = aligned_rows(1, geometry.header_bytes)
        got = self.calls.preadv(fd, [pages[0].data], 0)
        found = geometry.judge_header(pages[0])
        if got != geometry.header_bytes or found == "foreign":
            raise ForeignSegmentError(errno.EINVAL, f"{self.path(segment).name} has an index that we did not write")
        if found == "torn":  # the journal knows what it should say, and each block proves itself
            self.torn.add(segment)


class Scratch(threading.local):
    """Aligned memory of one worker thread, kept between calls."""

    def __init__(self) -> None:
        self._memory = aligned_rows(1, PAGE_BYTES)[0]

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """That many bytes, page aligned; what was taken before is gone."""
        if len(self._memory) < nbytes:
            self._memory = aligned_rows(1, -(-nbytes // PAGE_BYTES) * PAGE_BYTES)[0]
        return self._memory[:nbytes]


class Tails:
    """Aligned memory of calls under way, lent and taken back: as many pieces are kept as were ever lent at once, each of
    the longest call that it served."""

    def __init__(self) -> None:
        self._free: dict[int, deque[npt.NDArray[np.uint8]]] = {}

    def lend(self, count: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """uint8 [count or more, nbytes]; what is in it means nothing."""
        try:
            tails = self._free[nbytes].popleft()
            if len(tails) >= count:
                return tails
        except (KeyError, IndexError):
            pass
        return aligned_rows(1, count * nbytes)[0].reshape(count, nbytes)

    def give_back(self, tails: npt.NDArray[np.uint8]) -> None:
        self._free.setdefault(tails.shape[1], deque()).append(tails)


def are_aligned(memory: Rows, rows: IntArray) -> bool:
    """`is_aligned` of many rows; of one array it takes one look."""
    if isinstance(memory, np.ndarray):
        return memory.strides[0] % PAGE_BYTES == 0 and is_aligned(memory[0])
    return all(is_aligned(memory[row]) for row in rows.tolist())


def is_aligned(row: npt.NDArray[np.uint8]) -> bool:
    """Whether the kernel can move these bytes past the page cache as they lie."""
    return row.ctypes.data % PAGE_BYTES == 0 and row.nbytes % PAGE_BYTES == 0 and row.flags.c_contiguous


def _takes_direct(root: Path, calls: SystemCalls) -> bool:
    """Whether this file system takes O_DIRECT: write a page to a file of our own and remove it."""
    path, page = root / PROBE_FILE, aligned_rows(1, PAGE_BYTES)
    try:
        fd = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError:
        path.unlink(missing_ok=True)
        return False
    try:
        return calls.pwritev(fd, [page[0].data], 0) == PAGE_BYTES
    except OSError:
        return False
    finally:
        calls.close(fd)
        path.unlink(missing_ok=True)
