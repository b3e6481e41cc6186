"""The bytes of a journal: frames of msgpack records, found again also behind a damaged one.

A frame is u32 length, u32 crc32c, body. The body of each of our records is a map whose first key is `op`, so a frame can be
looked for where the length of the one before it means nothing any more. What a frame says is manifest.py's business.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import crc32c
import msgpack

_HEAD = struct.Struct("<II")
_MARK = b"\xa2op"  # how a body goes on after the byte that says how many fields there are
_MAX_FRAME_BYTES = 64 << 20
# bytes summed in search of one frame: what only looks like frames holds nobody up
_MAX_LOOKED_AT = 4 * _MAX_FRAME_BYTES


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole frame and where it lies. Where it does not start at the end of the one before, there is damage between."""

    start: int
    end: int
    body: memoryview


def framed(record: dict[str, Any]) -> bytes:
    body = msgpack.packb(record, use_bin_type=True)
    return _HEAD.pack(len(body), crc32c.crc32c(body)) + body


def whole_frames(raw: bytes) -> Iterator[Frame]:
    """Every frame that is whole, in order, also those behind damage."""
    position, view = 0, memoryview(raw)
    while position < len(raw):
        found = _frame_at(view, position) or _next_frame(raw, view, position)
        if found is None:
            return
        yield found
        position = found.end


def is_cut_short(raw: bytes, position: int) -> bool:
    """Whether the file ends before the frame at the position does, as where a write came no further."""
    if position + _HEAD.size > len(raw):
        return True
    length, _ = _HEAD.unpack_from(raw, position)
    return bool(position + _HEAD.size + length > len(raw))


def _frame_at(view: memoryview, position: int) -> Frame | None:
    if position + _HEAD.size > len(view):
        return None
    length, crc = _HEAD.unpack_from(view, position)
    end = position + _HEAD.size + length
    body = view[position + _HEAD.size : end]
    if not length or length > _MAX_FRAME_BYTES or len(body) < length or crc32c.crc32c(body) != crc:
        return None
    return Frame(position, end, body)


def _next_frame(raw: bytes, view: memoryview, bad: int) -> Frame | None:
    """The first whole frame behind a bad one: where that one says that it ends, else wherever there is one."""
    if bad + _HEAD.size <= len(raw):
        found = _frame_at(view, bad + _HEAD.size + _HEAD.unpack_from(raw, bad)[0])
        if found is not None:
            return found
    before, looked_at = _HEAD.size + 1, 0  # bytes of a frame before the mark
    at = raw.find(_MARK, bad + 1 + before)
    while at >= 0 and looked_at <= _MAX_LOOKED_AT:
        found = _frame_at(view, at - before)
        if found is not None:
            return found
        length = _HEAD.unpack_from(raw, at - before)[0]
        looked_at += length if length <= len(raw) - at else 0
        at = raw.find(_MARK, at + 1)
    return None
