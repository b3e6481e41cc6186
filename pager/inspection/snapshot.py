"""The snapshot page: the last status in a file that is mapped by its writer and read by anybody, also while it is stuck.

One writer. A sequence number is odd while the page is being written and a reader tries again when it changed under its
look; a sum over the body catches a reader that was too slow for both. Layout, little endian: magic (8 bytes), u64
sequence, u32 length, u32 crc32, f64 time of day in seconds, u64 time until which somebody watches (f64, written by
readers), body in msgpack. Imports neither numpy nor the pager, so that readers start fast.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import msgpack

from ...tiers.errors import ProtocolError, TierUnavailableError

MAGIC = b"KVTSNAP1"
_HEAD = struct.Struct("<8sQIId")
_WATCHED = struct.Struct("<d")
_WATCHED_AT = _HEAD.size
_BODY_AT = _WATCHED_AT + _WATCHED.size
PAGE_BYTES = 1 << 18
SUFFIX = ".page"
WATCH_S = 15.0
_TRIES = 50


def page_path(socket_path: str | os.PathLike[str]) -> Path:
    """The page of the pager that answers at that socket."""
    return Path(f"{os.fspath(socket_path)}{SUFFIX}")


class SnapshotPage:
    """The writer's side."""

    def __init__(self, path: Path, size: int = PAGE_BYTES) -> None:
        """Raises OSError."""
        self._path, self._size = path, size
        spare = path.with_name(path.name + ".new")
        fd = os.open(spare, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._map[: _HEAD.size] = _HEAD.pack(MAGIC, 0, 0, 0, 0.0)
        os.replace(spare, path)  # readers of an earlier page keep that one
        self._sequence = 0

    def write(self, body: Any, now_s: float) -> None:
        """Replace the snapshot. Raises ProtocolError when it does not fit."""
        packed = msgpack.packb(body, use_bin_type=True)
        if len(packed) > self._size - _BODY_AT:
            raise ProtocolError(f"snapshot of {len(packed)} bytes; the page holds {self._size - _BODY_AT}")
        self._begin()
        self._map[_BODY_AT : _BODY_AT + len(packed)] = packed
        self._sequence += 1
        self._map[: _HEAD.size] = _HEAD.pack(MAGIC, self._sequence, len(packed), zlib.crc32(packed), now_s)

    def _begin(self) -> None:
        self._sequence += 1
        struct.pack_into("<Q", self._map, len(MAGIC), self._sequence)

    def is_watched(self, now_s: float) -> bool:
        """Whether a reader said lately that it goes on looking."""
        until_s: float = _WATCHED.unpack_from(self._map, _WATCHED_AT)[0]
        return now_s < until_s <= now_s + 2 * WATCH_S

    def close(self) -> None:
        self.unmap()
        self.remove()

    def unmap(self) -> None:
        """By who writes, and writes no more."""
        self._map.close()

    def remove(self) -> None:
        """Readers find nothing here any more; it can still be written to."""
        self._path.unlink(missing_ok=True)


def read_snapshot(path: Path, *, watch: bool = False) -> dict[str, Any]:
    """The last snapshot, when it was taken (time of day) and its age. `watch`: ask for fresh ones from now on, for a while.

    Raises: TierUnavailableError when there is no page or it was never whole.
    """
    try:
        fd = os.open(path, os.O_RDWR if watch else os.O_RDONLY)
    except OSError as error:
        raise TierUnavailableError(
            f"no snapshot page at {path}: {error.strerror}; is a pager running there?"
        ) from error
    try:
        access = mmap.ACCESS_WRITE if watch else mmap.ACCESS_READ
        with mmap.mmap(fd, 0, access=access) as page:
            if watch:
                _WATCHED.pack_into(page, _WATCHED_AT, time.time() + WATCH_S)
            return _read(page, path)
    except ValueError as error:  # an empty file cannot be mapped
        raise TierUnavailableError(f"snapshot page {path} is empty") from error
    finally:
        os.close(fd)


def stop_watching(path: Path) -> None:
    """Nobody looks any more; who still does says so again at the next look."""
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(path, os.O_RDWR)
        try:
            with mmap.mmap(fd, 0) as page:
                _WATCHED.pack_into(page, _WATCHED_AT, 0.0)
        finally:
            os.close(fd)


def _read(page: mmap.mmap, path: Path) -> dict[str, Any]:
    for _ in range(_TRIES):
        magic, before, length, crc, time_s = _HEAD.unpack_from(page, 0)
        if magic != MAGIC or len(page) < _BODY_AT + length:
            raise TierUnavailableError(f"{path} is not a snapshot page")
        body = page[_BODY_AT : _BODY_AT + length]
        after = struct.unpack_from("<Q", page, len(MAGIC))[0]
        if before == after and before % 2 == 0 and length and zlib.crc32(body) == crc:
            found: dict[str, Any] = msgpack.unpackb(body, raw=False)
            return found | {"taken_s": time_s, "snapshot_age_s": max(0.0, time.time() - time_s)}
        time.sleep(0.002)
    raise TierUnavailableError(
        f"snapshot page {path} holds no whole snapshot: its writer stopped in the middle, or never began"
    )
