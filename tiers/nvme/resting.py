"""A store that is only looked at: what its journal lists, read and proven as the tier would, with nothing of it changed.

The lock is taken, so that nobody writes meanwhile; no call that could change a file gets as far as the kernel.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy.typing as npt

from ..streams import Backend, IntArray, Rows
from .calls import SystemCalls
from .files import SegmentFiles
from .identity import MANIFEST_FILE, StoreIdentity, claim, stored_codecs, stored_geometries
from .manifest import replay
from .movers import Movers
from .reading import IoTicket, Reader
from .segment_io import SegmentIo
from .slots import SlotBook


class LookingCalls(SystemCalls):
    """Reads alone."""

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_CREAT:
            self._refuse()
        return os.open(path, os.O_RDONLY)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._refuse()

    def append(self, fd: int, frame: memoryview) -> int:
        self._refuse()

    def fallocate(self, fd: int, size: int) -> None:
        self._refuse()

    def set_size(self, fd: int, size: int) -> None:
        self._refuse()

    def replace(self, source: Path, target: Path) -> None:
        self._refuse()

    def punch(self, fd: int, offset: int, size: int) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise OSError(errno.EROFS, "this store is only looked at")


class RestingTier:
    """As much of an NvmeTier as reading takes."""

    def __init__(self, path: Path, identity: StoreIdentity, backend: Backend, secrets: Mapping[int, bytes]) -> None:
        """Raises: ConfigError, StoreMismatchError, StoreLockedError."""
        calls = LookingCalls()
        self._layouts = identity.layouts
        self._lock_fd, _ = claim(path, identity, calls)
        try:
            geometries, codecs = stored_geometries(path, identity), stored_codecs(path, identity)
            found = replay(path / MANIFEST_FILE, calls)
            self._listing, self.journal_gaps, self.torn_journal_bytes = found.listing, found.gaps, found.torn_bytes
            self._files = SegmentFiles(path, identity.layouts, geometries, calls, direct=False)
            io, layouts = SegmentIo(self._files), identity.layouts
            self._movers = Movers(io, self._files, layouts, geometries, codecs, secrets, with_checksums=True)
            books = [SlotBook(0, geometry, self._listing.group(i)) for i, geometry in enumerate(geometries)]
            self._reader = Reader(backend.read_io, self._movers, books, identity.layouts)
        except BaseException:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        self._files.close()
        os.close(self._lock_fd)

    @property
    def is_encrypted(self) -> bool:
        return self._movers.is_encrypted

    @property
    def torn_indexes(self) -> int:
        """Of the segments that were read; their blocks are not touched by it."""
        return len(self._files.torn)

    def sessions(self) -> dict[str, dict[str, Any]]:
        return self._listing.sessions

    def recovered(self) -> list[tuple[IntArray, npt.NDArray[Any]]]:
        """Slots and stamps per group that the manifest lists."""
        listed = [self._listing.group(i).slots() for i in range(len(self._layouts))]
        return [(slots, self.stamps(i, slots)) for i, slots in enumerate(listed)]

    def stamps(self, group: int, slots: IntArray) -> npt.NDArray[Any]:
        return self._listing.group(group).stamps[slots]

    def block_bytes(self, group: int) -> int:
        return self._layouts[group].block_bytes

    def spare_rows(self, group: int, count: int) -> Rows:
        return self._movers.spare_rows(group, count)

    def read(
        self, group: int, slots: IntArray, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> IoTicket:
        return self._reader.read(group, slots, target, target_rows, stamps)
