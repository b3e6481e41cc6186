"""What the store asks of the kernel: one seam, so that tests can make any call fail, and how a small file is replaced whole.

Bulk data goes to segments (files.py), records to the journal (manifest.py); identity and metadata files are small and are
written here: under another name, synced, then renamed, so that a crash leaves the old file or the new one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # <linux/falloc.h>
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND


class SystemCalls:
    """What we ask of the kernel. Each raises OSError."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags, 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def append(self, fd: int, frame: memoryview) -> int:
        return os.write(fd, frame)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fallocate(self, fd: int, size: int) -> None:
        os.posix_fallocate(fd, 0, size)

    def set_size(self, fd: int, size: int) -> None:
        """A file of that size; what is not written takes no disk."""
        os.ftruncate(fd, size)

    def replace(self, source: Path, target: Path) -> None:
        """Rename; whoever opens the target sees the old file or the new one."""
        source.replace(target)

    def sync_directory(self, path: Path) -> None:
        """Names made or replaced in this directory survive a power loss once this returns."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def boot_id(self) -> str:
        """Of the running kernel: what was written under the same one cannot have been lost to a power loss. "": unknown."""
        try:
            return _BOOT_ID.read_text().strip()
        except OSError:
            return ""

    def next_byte(self, fd: int, offset: int) -> int:
        """Where the first byte that takes disk lies, at the offset or behind it."""
        return os.lseek(fd, offset, os.SEEK_DATA)

    def punch(self, fd: int, offset: int, size: int) -> None:
        """Give the disk under these bytes back; they read as zeros from now on."""
        if _LIBC.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(size)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


REAL_CALLS = SystemCalls()


def append_all(calls: SystemCalls, fd: int, data: bytes) -> None:
    """Write all of it at the end of the file, or raise OSError with a part written."""
    left = memoryview(data)
    while left:
        left = left[calls.append(fd, left) :]


def replace_file(calls: SystemCalls, path: Path, data: bytes, spare: Path, *, is_synced: bool = True) -> None:
    """The file, whole or as it was; its bytes are on the medium before its name is, where `is_synced`.

    Whoever needs the name itself to last syncs the directory. `spare` is what it is called until it is whole. Raises OSError.
    """
    spare.unlink(missing_ok=True)
    fd = calls.open(spare, NEW_FILE)
    try:
        try:
            append_all(calls, fd, data)
            if is_synced:
                calls.fdatasync(fd)
        finally:
            calls.close(fd)
        calls.replace(spare, path)
    except OSError:
        spare.unlink(missing_ok=True)
        raise
