"""Manifest: an append-only file of framed msgpack records that says which slots hold what, and the parked sessions.

A frame is u32 length, u32 crc32c, body. Replay stops at the first frame that is not whole: what a crash tore off was
never acknowledged. Opening rewrites the file compactly (temporary file, fsync, rename), so it never grows for ever.
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

STAMP = np.dtype([("key", "V32"), ("generation", "<u8"), ("checksum", "<u8"), ("tokens", "<u4")])
_FRAME = struct.Struct("<II")
_MAX_FRAME_BYTES = 64 << 20
_BATCH = 4096  # slots per record when the file is rewritten


@dataclass(slots=True)
class Listing:
    """What a manifest lists: stamps by slot, per layer group; and session records."""

    blocks: list[dict[int, npt.NDArray[Any]]] = field(default_factory=list)
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)

    def apply(self, record: dict[str, Any]) -> None:
        kind = record["op"]
        if kind == "put":
            stamps = np.frombuffer(record["stamps"], STAMP)
            for slot, stamp in zip(np.frombuffer(record["slots"], "<i8").tolist(), stamps, strict=True):
                self.group(record["group"])[slot] = stamp
        elif kind == "drop":
            for slot in np.frombuffer(record["slots"], "<i8").tolist():
                self.group(record["group"]).pop(slot, None)
        elif kind == "session":
            self.sessions[record["id"]] = record["record"]
        elif kind == "forget":
            self.sessions.pop(record["id"], None)

    def group(self, index: int) -> dict[int, npt.NDArray[Any]]:
        while len(self.blocks) <= index:
            self.blocks.append({})
        return self.blocks[index]


class Manifest:
    """The open file; one writer, who holds the store's lock."""

    def __init__(self, path: Path, fd: int, listing: Listing) -> None:
        self._path, self._fd, self.listing = path, fd, listing

    @classmethod
    def open(cls, path: Path) -> Manifest:
        """Replay, then rewrite compactly."""
        listing = replay(path)
        temporary = path.with_suffix(".new")
        with open(temporary, "wb") as file:
            for record in _compact(listing):
                file.write(_frame(record))
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o600)
        temporary.replace(path)
        _sync_directory(path.parent)
        return cls(path, os.open(path, os.O_WRONLY | os.O_APPEND), listing)

    def put(self, group: int, slots: npt.NDArray[np.int64], stamps: npt.NDArray[Any]) -> None:
        self._append({"op": "put", "group": group, "slots": _slots(slots), "stamps": stamps.tobytes()})

    def drop(self, group: int, slots: npt.NDArray[np.int64]) -> None:
        self._append({"op": "drop", "group": group, "slots": _slots(slots)})

    def put_session(self, session_id: str, record: dict[str, Any]) -> None:
        self._append({"op": "session", "id": session_id, "record": record})

    def drop_session(self, session_id: str) -> None:
        self._append({"op": "forget", "id": session_id})

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, record: dict[str, Any]) -> None:
        frame = memoryview(_frame(record))
        while frame:
            frame = frame[os.write(self._fd, frame) :]
        if record["op"] in ("session", "forget"):
            self.listing.apply(record)


def replay(path: Path) -> Listing:
    """What the file lists, up to its first torn frame; empty when there is no file."""
    listing = Listing()
    if path.exists():
        for record in _frames(path.read_bytes()):
            listing.apply(record)
    return listing


def _frames(raw: bytes) -> Iterator[dict[str, Any]]:
    position = 0
    while position + _FRAME.size <= len(raw):
        length, crc = _FRAME.unpack_from(raw, position)
        body = raw[position + _FRAME.size : position + _FRAME.size + length]
        if length > _MAX_FRAME_BYTES or len(body) < length or crc32c.crc32c(body) != crc:
            return
        yield msgpack.unpackb(body, raw=False)
        position += _FRAME.size + length


def _frame(record: dict[str, Any]) -> bytes:
    body = msgpack.packb(record, use_bin_type=True)
    return _FRAME.pack(len(body), crc32c.crc32c(body)) + body


def _compact(listing: Listing) -> Iterator[dict[str, Any]]:
    for group, stamps in enumerate(listing.blocks):
        slots = sorted(stamps)
        for i in range(0, len(slots), _BATCH):
            part = slots[i : i + _BATCH]
            packed = b"".join(stamps[slot].tobytes() for slot in part)
            yield {"op": "put", "group": group, "slots": _slots(np.array(part)), "stamps": packed}
    for session_id, record in listing.sessions.items():
        yield {"op": "session", "id": session_id, "record": record}


def _slots(slots: npt.NDArray[np.int64]) -> bytes:
    return np.ascontiguousarray(slots, "<i8").tobytes()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
