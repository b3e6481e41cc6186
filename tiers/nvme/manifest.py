"""Manifest: an append-only journal of framed msgpack records that says which slots hold what, and the parked sessions.

A frame is u32 length, u32 crc32c, body; block records hold arrays, so that a million of them replay in a fraction of a
second. Replay stops at the first frame that is not whole and the file is cut there: what a crash tore off was never
acknowledged. When half of a large journal is history it is rewritten as a snapshot (temporary file, fsync, rename).
Guards what was acknowledged: a journal whose sync was refused is never trusted because a later sync succeeds, it is
written anew; and nothing is appended behind a frame that a failed write left in part.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crc32c
import msgpack
import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .files import SystemCalls, sync_directory

STAMP = np.dtype(
    [
        ("key", "V32"),
        ("generation", "<u8"),
        ("checksum", "<u8"),  # of the block, whatever its encoding
        ("tokens", "<u4"),
        ("owner", "<u4"),
        ("stored_bytes", "<u8"),  # of the chunk and its crc, as Zarr's index lists them; set by whoever writes it
    ]
)
_FRAME = struct.Struct("<II")
_MAX_FRAME_BYTES = 64 << 20
_BATCH = 4096  # slots per record of a snapshot
MAX_GROUPS, MAX_SLOTS = 1024, 1 << 28  # more is no store of ours: a petabyte of 4 MiB blocks
_NO_RECORD = (ValueError, LookupError, TypeError, AttributeError, MemoryError, RecursionError, msgpack.UnpackException)
SNAPSHOT_BYTES = 16 << 20  # a smaller journal is never rewritten
IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class GroupListing:
    """Stamps by slot of one layer group; a stamp counts where `listed`.

    `changed`: the index page on disk may not say so yet. `doubtful`: no sync since the block's bytes were written.
    """

    stamps: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, STAMP))
    listed: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    changed: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    doubtful: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    def reach(self, size: int) -> None:
        if size > len(self.stamps):
            size = max(size, 2 * len(self.stamps), 64)
            self.stamps = _grown(self.stamps, size)
            self.listed, self.changed = _grown(self.listed, size), _grown(self.changed, size)
            self.doubtful = _grown(self.doubtful, size)

    def put(self, slots: IntArray, stamps: npt.NDArray[Any], *, is_synced: bool) -> None:
        if len(slots):
            self.reach(int(slots.max()) + 1)
            self.stamps[slots] = stamps
            self.listed[slots] = self.changed[slots] = True
            self.doubtful[slots] = not is_synced

    def drop(self, slots: IntArray) -> None:
        slots = slots[slots < len(self.listed)]
        self.listed[slots], self.changed[slots] = False, True

    def believe(self, slots: IntArray) -> None:
        self.doubtful[slots[slots < len(self.doubtful)]] = False

    def settle(self) -> None:
        self.changed[:] = self.doubtful[:] = False

    def slots(self) -> IntArray:
        return np.flatnonzero(self.listed)

    def doubts(self) -> IntArray:
        """Listed slots whose bytes a power loss could have taken."""
        return np.flatnonzero(self.doubtful & self.listed)

    def in_segment(self, number: int, size: int) -> npt.NDArray[np.bool_]:
        """Which slots of a segment are listed; a view, shorter where the listing does not reach."""
        return self.listed[number * size : (number + 1) * size]

    def stored_in_segment(self, number: int, size: int) -> npt.NDArray[np.uint64]:
        """Stored bytes of each slot of a segment, 0 where nothing is listed."""
        self.reach((number + 1) * size)
        stamps = self.stamps[number * size : (number + 1) * size]
        return np.where(self.in_segment(number, size), stamps["stored_bytes"], np.uint64(0))


@dataclass(slots=True)
class Listing:
    """What a manifest lists: stamps by slot, per layer group, and session records; and in which boot it was written last."""

    groups: list[GroupListing] = field(default_factory=list)
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    boot: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether a commit came after the last change."""
        return not any(group.changed.any() for group in self.groups)

    def apply(self, record: dict[str, Any]) -> None:
        """Raises ValueError, LookupError or TypeError for a record that is none of ours; nothing is changed then."""
        kind = record["op"]
        if kind in ("put", "drop", "move"):
            group, slots = _group_number(record["group"]), _slots(record["slots"])
            if kind != "drop" and len(record["stamps"]) != len(slots) * STAMP.itemsize:
                raise ValueError(f"{len(slots)} slots and {len(record['stamps'])} bytes of stamps")
            if kind == "move":
                self.group(group).drop(_slots(record["left"]))
            if kind == "drop":
                self.group(group).drop(slots)
            else:
                stamps = np.frombuffer(record["stamps"], STAMP)
                self.group(group).put(slots, stamps, is_synced=kind == "move")
        elif kind == "synced":
            self.group(_group_number(record["group"])).believe(_slots(record["slots"]))
        elif kind == "session":
            self.sessions[str(record["id"])] = dict(record["record"])
        elif kind == "forget":
            self.sessions.pop(record["id"], None)
        elif kind == "boot":
            self.boot = str(record["id"])
        elif kind == "commit":
            for settled in self.groups:
                settled.settle()

    def group(self, index: int) -> GroupListing:
        while len(self.groups) <= index:
            self.groups.append(GroupListing())
        return self.groups[index]


class Manifest:
    """The open journal; one writer, who holds the store's lock. `listing` is what it says, kept up to date."""

    def __init__(self, path: Path, fd: int, listing: Listing, size: int, calls: SystemCalls) -> None:
        self._path, self._fd, self.listing, self._size, self._calls = path, fd, listing, size, calls
        self._is_doubtful = False  # a sync was refused: what lies on the disk nobody knows
        self._is_torn = False  # part of a frame lies behind `_size`

    @classmethod
    def open(cls, path: Path, calls: SystemCalls | None = None) -> Manifest:
        """Replay, and cut off what is not whole. Raises OSError, and ConfigError for records that are none of ours."""
        calls = calls or SystemCalls()
        is_new = not path.exists()
        listing, size = _replay(b"" if is_new else path.read_bytes())
        fd = calls.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.ftruncate(fd, size)
        if is_new:
            sync_directory(path.parent)
        return cls(path, fd, listing, size, calls)

    def put(self, group: int, slots: IntArray, stamps: npt.NDArray[Any]) -> None:
        self._append({"op": "put", "group": group, "slots": _packed(slots), "stamps": stamps.tobytes()})

    def drop(self, group: int, slots: IntArray) -> None:
        self._append({"op": "drop", "group": group, "slots": _packed(slots)})

    def move(self, group: int, left: IntArray, slots: IntArray, stamps: npt.NDArray[Any]) -> None:
        """Blocks are in other slots from now on, where their bytes are synced already.

        One record, so that they are always listed exactly once.
        """
        self._append(
            {
                "op": "move",
                "group": group,
                "left": _packed(left),
                "slots": _packed(slots),
                "stamps": stamps.tobytes(),
            }
        )

    def believe(self, group: int, slots: IntArray) -> None:
        """The bytes of these slots were synced."""
        self._append({"op": "synced", "group": group, "slots": _packed(slots)})

    def begin_boot(self, boot_id: str) -> None:
        """What follows is written under this boot of the machine."""
        self._append({"op": "boot", "id": boot_id})

    def put_session(self, session_id: str, record: dict[str, Any]) -> None:
        self._append({"op": "session", "id": session_id, "record": record})

    def drop_session(self, session_id: str) -> None:
        self._append({"op": "forget", "id": session_id})

    def commit(self) -> None:
        """Everything recorded so far is synced, and in the index pages too."""
        self._append({"op": "commit"})

    def sync(self) -> None:
        """What was recorded survives a power loss once this returns. Raises OSError."""
        if self._is_doubtful:
            self.shrink(always=True)
            return
        try:
            self._calls.fdatasync(self._fd)
        except OSError:
            self._is_doubtful = True
            raise

    def shrink(self, *, always: bool = False) -> bool:
        """Rewrite the journal as a snapshot where at least half of a large one is history. True when it did."""
        live = sum(int(group.listed.sum()) for group in self.listing.groups) * (STAMP.itemsize + 8)
        if not always and (self._size < SNAPSHOT_BYTES or self._size < 2 * live):
            return False
        temporary = self._path.with_suffix(".new")
        with open(temporary, "wb") as file:
            for record in _snapshot(self.listing):
                file.write(_frame(record))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        temporary.chmod(0o600)
        fd = self._calls.open(temporary, os.O_WRONLY | os.O_APPEND)  # before the old one is gone: this can fail
        try:
            temporary.replace(self._path)
        except OSError:
            self._calls.close(fd)
            raise
        self._calls.close(self._fd)
        self._fd, self._size, self._is_torn = fd, size, False
        sync_directory(self._path.parent)
        self._is_doubtful = False
        return True

    def close(self) -> None:
        self._calls.close(self._fd)

    def _append(self, record: dict[str, Any]) -> None:
        """Write one frame whole, or cut the file back to where it was. Raises OSError; nothing is listed then."""
        frame = _frame(record)
        left = memoryview(frame)
        if self._is_torn:
            self._cut()
        try:
            while left:
                left = left[self._calls.append(self._fd, left) :]
        except OSError:
            self._is_torn = True
            self._cut()
            raise
        self._size += len(frame)
        self.listing.apply(record)

    def _cut(self) -> None:
        self._calls.set_size(self._fd, self._size)
        self._is_torn = False


def replay(path: Path) -> Listing:
    """What the file lists, up to its first torn frame; empty when there is no file. Raises ConfigError."""
    return _replay(path.read_bytes() if path.exists() else b"")[0]


def _replay(raw: bytes) -> tuple[Listing, int]:
    """The listing, and how many bytes of whole frames there are. Raises ConfigError."""
    listing, position = Listing(), 0
    for body, end in _frames(raw):
        try:
            listing.apply(msgpack.unpackb(body, raw=False))
        except _NO_RECORD as error:
            raise ConfigError(
                f"manifest.log: the record at byte {position} is whole and none that this version writes ({error!r:.200}); "
                "another program or a later version wrote it: open the store with that, or delete it"
            ) from error
        position = end
    return listing, position


def _frames(raw: bytes) -> Iterator[tuple[memoryview, int]]:
    view, position = memoryview(raw), 0
    while position + _FRAME.size <= len(raw):
        length, crc = _FRAME.unpack_from(raw, position)
        end = position + _FRAME.size + length
        body = view[position + _FRAME.size : end]
        if not length or length > _MAX_FRAME_BYTES or len(body) < length or crc32c.crc32c(body) != crc:
            return
        yield body, end
        position = end


def _group_number(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < MAX_GROUPS:
        raise ValueError(f"group {value!r}")
    return value


def _slots(raw: bytes) -> IntArray:
    slots: IntArray = np.frombuffer(raw, "<i8")
    if len(slots) and not (slots.min() >= 0 and slots.max() < MAX_SLOTS):
        raise ValueError(f"slots from {slots.min()} to {slots.max()}")
    return slots


def _frame(record: dict[str, Any]) -> bytes:
    body = msgpack.packb(record, use_bin_type=True)
    return _FRAME.pack(len(body), crc32c.crc32c(body)) + body


def _snapshot(listing: Listing) -> Iterator[dict[str, Any]]:
    if listing.boot:
        yield {"op": "boot", "id": listing.boot}
    for index, group in enumerate(listing.groups):
        slots = group.slots()
        for i in range(0, len(slots), _BATCH):
            part = slots[i : i + _BATCH]
            yield {"op": "put", "group": index, "slots": _packed(part), "stamps": group.stamps[part].tobytes()}
            yield {"op": "synced", "group": index, "slots": _packed(part[~group.doubtful[part]])}
    for session_id, record in listing.sessions.items():
        yield {"op": "session", "id": session_id, "record": record}
    if listing.is_settled:
        yield {"op": "commit"}


def _grown(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """The same with zeros behind; what is not written takes no memory."""
    grown = np.zeros(size, array.dtype)
    grown[: len(array)] = array
    return grown


def _packed(slots: IntArray) -> bytes:
    return np.ascontiguousarray(slots, "<i8").tobytes()
