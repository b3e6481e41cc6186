"""Manifest: an append-only journal of msgpack records that says which slots hold what, and the parked sessions.

Block records hold arrays, so that a million of them replay in a fraction of a second. What a crash tore off the end was
never acknowledged and is cut. What is broken before the end is damage: it costs what it listed and no more, is counted,
logged, kept aside and gone with the next snapshot; a block behind it proves itself when it is read, as any. After a power
loss both look alike, so records say how far the journal was synced (`safe`): before that it can only be damage, behind it
nothing is believed that comes after a gap. When half of a large journal is history it is rewritten as a snapshot
(temporary file, sync, rename).
Guards what was acknowledged: a journal whose sync was refused is never trusted because a later sync succeeds, it is
written anew; and nothing is appended behind a frame that a failed write left in part.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..kernel_calls import give_back_heap
from .calls import NEW_FILE, SystemCalls, append_all, replace_file
from .journal import framed, is_cut_short, whole_frames

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
_BATCH = 4096  # slots per record of a snapshot
MAX_GROUPS, MAX_SLOTS = 1024, 1 << 28  # more is no store of ours: a petabyte of 4 MiB blocks
_NO_RECORD = (ValueError, LookupError, TypeError, AttributeError, MemoryError, RecursionError, msgpack.UnpackException)
SNAPSHOT_BYTES = 16 << 20  # a smaller journal is never rewritten
IntArray = npt.NDArray[np.int64]
_LOG = logging.getLogger("kvtier.nvme")


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

    def distrust_indexes(self) -> None:
        """Nobody knows what the index pages say of what is not listed here."""
        for group in self.groups:
            group.changed[:] = True

    def group(self, index: int) -> GroupListing:
        while len(self.groups) <= index:
            self.groups.append(GroupListing())
        return self.groups[index]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a journal's bytes say. `size`: of what is believed. `gaps`: damaged places, whole records behind all but a last."""

    listing: Listing
    size: int
    gaps: int
    torn_bytes: int  # behind `size`
    is_closed: bool  # in order: whoever wrote it had all of it synced


class Manifest:
    """The open journal; one writer, who holds the store's lock. `listing` is what it says, kept up to date."""

    def __init__(self, path: Path, fd: int, found: Replayed, calls: SystemCalls) -> None:
        self._path, self._fd, self._calls = path, fd, calls
        self.listing, self.gaps, self.torn_bytes = found.listing, found.gaps, found.torn_bytes
        self._size, self._safe = found.size, 0  # bytes; of them, known to be synced
        self._has_news = False  # since it was last closed in order
        self._shrink_from = SNAPSHOT_BYTES
        # a sync was refused, perhaps that of a process which was killed then: what lies on the disk nobody knows, and a later
        # sync that succeeds says nothing of it
        self._is_doubtful = found.size > 0 and not found.is_closed
        self._is_torn = False  # part of a frame lies behind `_size`

    @classmethod
    def open(cls, path: Path, calls: SystemCalls | None = None) -> Manifest:
        """Replay, and cut off what is not whole. Raises OSError, and ConfigError for records that are none of ours."""
        calls = calls or SystemCalls()
        is_new = not path.exists()
        raw = b"" if is_new else path.read_bytes()
        found = _replay(raw, calls.boot_id())
        if found.gaps:
            _keep_aside(path, raw, found, calls)
        fd = calls.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            if found.torn_bytes:
                calls.set_size(fd, found.size)
            if is_new:
                calls.sync_directory(path.parent)
        except OSError:
            calls.close(fd)
            raise
        manifest = cls(path, fd, found, calls)
        if len(raw) > SNAPSHOT_BYTES:
            give_back_heap()  # of tables that grew
        if found.gaps:
            manifest.shrink_if_possible(always=True)
        return manifest

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
        self._append({"op": "synced", "group": group, "slots": _packed(slots), "safe": self._safe})

    def begin_boot(self, boot_id: str) -> None:
        """What follows is written under this boot of the machine."""
        self._append({"op": "boot", "id": boot_id})

    def put_session(self, session_id: str, record: dict[str, Any]) -> None:
        self._append({"op": "session", "id": session_id, "record": record})

    def drop_session(self, session_id: str) -> None:
        self._append({"op": "forget", "id": session_id})

    def commit(self) -> None:
        """Everything recorded so far is synced, and in the index pages too."""
        self._append({"op": "commit", "safe": self._safe})

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
        self._safe = self._size

    def shrink(self, *, always: bool = False) -> bool:
        """Rewrite the journal as a snapshot where at least half of a large one is history. True when it did.

        Raises OSError; what was recorded goes on to count.
        """
        live = sum(int(group.listed.sum()) for group in self.listing.groups) * (STAMP.itemsize + 8)
        if not always and (self._size < self._shrink_from or self._size < 2 * live):
            return False
        temporary = self._path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        fd, size = self._calls.open(temporary, NEW_FILE), 0
        try:
            for record in _snapshot(self.listing):
                frame = framed(record)
                append_all(self._calls, fd, frame)
                size += len(frame)
            frame = framed({"op": "safe", "safe": size})  # it gets its name once it is synced
            append_all(self._calls, fd, frame)
            self._calls.fdatasync(fd)
            self._calls.replace(temporary, self._path)
        except BaseException:
            self._calls.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        self._calls.close(self._fd)
        self._fd, self._size, self._is_torn, self._has_news = fd, size + len(frame), False, True
        self._is_doubtful = True  # a power loss could still bring the old one back
        self._calls.sync_directory(self._path.parent)
        self._is_doubtful, self._safe, self._shrink_from = False, self._size, SNAPSHOT_BYTES
        return True

    def shrink_if_possible(self, *, always: bool = False) -> None:
        """`shrink`; where the disk refuses, the journal is used as it is, and tried again when it has grown by as much."""
        try:
            self.shrink(always=always)
        except OSError as error:
            self._shrink_from = self._size + SNAPSHOT_BYTES
            _LOG.warning("event=no_snapshot journal=%s reason=%s", self._path, error.strerror)

    def close(self) -> None:
        """Say that all is safe, if that can be said, and take no more."""
        try:
            if self._has_news and self._safe == self._size:
                self._append({"op": "safe", "safe": self._safe, "is_closed": True})
        except OSError:
            pass  # after a power loss, damage then counts as what that tore off
        self._calls.close(self._fd)
        self._fd = -1

    def _append(self, record: dict[str, Any]) -> None:
        """Write one frame whole, or cut the file back to where it was. Raises OSError; nothing is listed then."""
        if self._fd < 0:
            raise OSError(errno.EBADF, "the journal is closed")
        frame = framed(record)
        if self._is_torn:
            self._cut()
        try:
            append_all(self._calls, self._fd, frame)
        except OSError:
            self._is_torn = True
            self._cut()
            raise
        self._size += len(frame)
        self._has_news = True
        self.listing.apply(record)

    def _cut(self) -> None:
        self._calls.set_size(self._fd, self._size)
        self._is_torn = False


def replay(path: Path, calls: SystemCalls | None = None) -> Replayed:
    """What the file lists; nothing when there is no file. Changes nothing. Raises ConfigError."""
    return _replay(path.read_bytes() if path.exists() else b"", (calls or SystemCalls()).boot_id())


def _replay(raw: bytes, boot: str = "") -> Replayed:
    """`boot`: that of the machine now, which tells whether it can have lost power since. Raises ConfigError."""
    listing, end, gaps, is_closed = Listing(), 0, 0, False
    safe: int | None = None
    for frame in whole_frames(raw):
        if frame.start > end:
            gaps += 1
            safe = _safe_bytes(raw, boot) if safe is None else safe
            if frame.start > safe:
                break
        try:
            record = msgpack.unpackb(frame.body, raw=False)
            listing.apply(record)
            is_closed = record.get("is_closed") is True and record["safe"] == frame.start
        except _NO_RECORD as error:
            raise ConfigError(
                f"manifest.log: the record at byte {frame.start} is whole and none that this version writes "
                f"({error!r:.200}); another program or a later version wrote it: open the store with that, or delete it"
            ) from error
        end = frame.end
    else:
        if end < len(raw) and not is_cut_short(raw, end) and boot and boot == listing.boot:
            gaps += 1  # no write ends in a whole length of other bytes
    if gaps:
        listing.distrust_indexes()
    return Replayed(listing, end, gaps, len(raw) - end, is_closed and end == len(raw))


def _safe_bytes(raw: bytes, boot: str) -> int:
    """How much of a journal was synced, or was never in a power loss: what is broken there is damage and nothing else."""
    last, safe = "", 0
    for frame in whole_frames(raw):
        try:
            record = msgpack.unpackb(frame.body, raw=False)
            last = str(record["id"]) if record["op"] == "boot" else last
            said = record.get("safe", 0)
            safe = max(safe, min(said, frame.start)) if isinstance(said, int) else safe
        except _NO_RECORD:
            continue  # replay says so
    return len(raw) if boot and boot == last else safe


def _keep_aside(path: Path, raw: bytes, found: Replayed, calls: SystemCalls) -> None:
    """A copy of a damaged journal, in place of the last such; the store goes on without if there is no room for it."""
    kept = path.with_suffix(".damaged")
    _LOG.error(
        "event=journal_damaged journal=%s places=%d cut_bytes=%d: what was recorded there is lost, the rest is not; "
        "a copy is kept as %s",
        *(path, found.gaps, found.torn_bytes, kept.name),
    )
    try:
        replace_file(calls, kept, raw, path.with_suffix(".new"))
    except OSError as error:
        _LOG.error("event=no_copy_of_damaged_journal reason=%s", error.strerror)


def _group_number(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < MAX_GROUPS:
        raise ValueError(f"group {value!r}")
    return value


def _slots(raw: bytes) -> IntArray:
    slots: IntArray = np.frombuffer(raw, "<i8")
    if len(slots) and not (slots.min() >= 0 and slots.max() < MAX_SLOTS):
        raise ValueError(f"slots from {slots.min()} to {slots.max()}")
    return slots


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
