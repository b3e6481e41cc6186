"""Frames: a 16-byte header, a msgpack map, and where flag RAW is set the bytes of blocks behind it.

    u32 length of all that follows | u8 frame version | u8 kind | u16 flags | u64 request id      little endian
    RAW: u32 length of the map | map | payload

No I/O and no state; both sides use it. Guards the reader: nothing is allocated for what a peer only announces, and what
is not exactly a frame is a ProtocolError. Blocks never pass through msgpack.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgpack

from ...tiers.errors import ProtocolError

HEADER = struct.Struct("<IBBHQ")
FRAME_VERSION = 1
RAW = 1  # the only flag
META_LENGTH = struct.Struct("<I")
MAX_STRANGER_BYTES = 4096  # of a frame before HELLO
MAX_CONTROL_BYTES = 8 << 20  # a session of a million tokens takes half of that
MAX_RAW_BYTES = 64 << 20
MAX_DEPTH = 8  # of nested maps and arrays
_MAX_TEXT_BYTES, _MAX_ITEMS, _MAX_FIELDS = 1 << 16, 1 << 16, 256

Fields = dict[str, object]


@dataclass(frozen=True, slots=True)
class Header:
    """`size` counts everything behind the header."""

    size: int
    kind: int
    flags: int
    request_id: int

    @property
    def is_raw(self) -> bool:
        return bool(self.flags & RAW)


def parse_header(frame: bytes | bytearray | memoryview, *, limit: int = MAX_CONTROL_BYTES, offset: int = 0) -> Header:
    """Raises ProtocolError for another version, an unknown flag, or more bytes than `limit` (RAW: MAX_RAW_BYTES)."""
    size, version, kind, flags, request_id = HEADER.unpack_from(frame, offset)
    if version != FRAME_VERSION:
        raise ProtocolError(f"frame version {version}; this side reads version {FRAME_VERSION}")
    if flags & ~RAW:
        raise ProtocolError(f"frame flags {flags:#x}: only {RAW:#x} (raw bytes behind the map) is known")
    most = MAX_RAW_BYTES if flags & RAW and limit > MAX_STRANGER_BYTES else limit
    if size > most:
        raise ProtocolError(f"frame announces {size} bytes; the limit is {most}")
    return Header(size, kind, flags, request_id)


def pack(kind: int, request_id: int, fields: Fields) -> bytes:
    """A frame without a payload. Raises ProtocolError when it is too large."""
    body = _packed(fields)
    return HEADER.pack(len(body), FRAME_VERSION, kind, 0, request_id) + body


def pack_raw(kind: int, request_id: int, fields: Fields, payload_bytes: int) -> bytes:
    """All of a frame but its payload, which the caller sends behind it."""
    body = _packed(fields)
    size = META_LENGTH.size + len(body) + payload_bytes
    if size > MAX_RAW_BYTES:
        raise ProtocolError(f"frame of {size} bytes; the limit is {MAX_RAW_BYTES}: send fewer blocks at once")
    return HEADER.pack(size, FRAME_VERSION, kind, RAW, request_id) + META_LENGTH.pack(len(body)) + body


def unpack(body: bytes | bytearray | memoryview) -> Fields:
    """The map of a frame. Raises ProtocolError for anything but one map of plain values within the limits."""
    try:
        found = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            max_str_len=_MAX_TEXT_BYTES,
            max_bin_len=MAX_CONTROL_BYTES,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_FIELDS,
            object_pairs_hook=_no_field_twice,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"frame is not msgpack within the limits: {error}") from error
    if not isinstance(found, dict):
        raise ProtocolError(f"frame holds a {type(found).__name__}, not a map")
    _check_depth(found, MAX_DEPTH)
    return found


def meta_bytes(header: Header, start: bytes | bytearray | memoryview, *, offset: int = 0) -> int:
    """Length of the map of a RAW frame, from the first 4 bytes behind its header. Raises ProtocolError."""
    size = int(META_LENGTH.unpack_from(start, offset)[0])
    if size > header.size - META_LENGTH.size or size > MAX_CONTROL_BYTES:
        raise ProtocolError(f"raw frame of {header.size} bytes announces a map of {size}")
    return size


def _packed(fields: Fields) -> bytes:
    body: bytes = msgpack.packb(fields, use_bin_type=True)
    if len(body) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"frame of {len(body)} bytes; the limit is {MAX_CONTROL_BYTES}: ask for fewer keys at once")
    return body


def _no_field_twice(pairs: list[tuple[object, object]]) -> dict[object, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field appears twice")
    return found


def _check_depth(value: object, left: int) -> None:
    if left == 0:
        raise ProtocolError(f"frame is nested deeper than {MAX_DEPTH} levels")
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        if isinstance(part, dict | list):
            _check_depth(part, left - 1)
