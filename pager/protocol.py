"""What travels between a pager and those who look at it: frames, and the status object with its version.

Imports nothing of ours but errors, and neither torch nor zarr, so that an inspector starts in a blink. A frame is a
16-byte header (u32 length, u8 version, u8 type, u16 flags, u64 request id, little endian) and a msgpack body.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

import msgpack

from ..tiers.errors import ConfigError, KvTierError, ProtocolError, TierUnavailableError

__all__ = ["KvTierError", "encode", "fetch_status", "read_frame"]
VERSION = 1
HEADER = struct.Struct("<IBBHQ")
MAX_BODY_BYTES = 1 << 20
STATUS_REQUEST, STATUS_REPLY, ERROR_REPLY = 1, 2, 3
INSPECT_REQUEST, INSPECT_REPLY = 4, 5  # {"verb": ..., arguments}: see inspection/inspector.py
STATUS_SOCKET = "status.sock"


def encode(kind: int, request_id: int, body: Any) -> bytes:
    """One frame. Raises ProtocolError when the body is too large."""
    packed = msgpack.packb(body, use_bin_type=True)
    if len(packed) > MAX_BODY_BYTES:
        raise ProtocolError(f"frame body has {len(packed)} bytes; the limit is {MAX_BODY_BYTES}")
    return HEADER.pack(len(packed), VERSION, kind, 0, request_id) + packed


def read_frame(connection: socket.socket) -> tuple[int, int, Any]:
    """Kind, request id and body of the next frame. Raises ProtocolError for anything that is not one."""
    length, version, kind, flags, request_id = HEADER.unpack(_read_exactly(connection, HEADER.size))
    if version != VERSION or flags:
        raise ProtocolError(f"frame of version {version}, flags {flags}; this side speaks version {VERSION}")
    if length > MAX_BODY_BYTES:
        raise ProtocolError(f"frame announces {length} bytes; the limit is {MAX_BODY_BYTES}")
    try:
        body = msgpack.unpackb(_read_exactly(connection, length), raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"frame body is not msgpack: {error}") from error
    return kind, request_id, body


def fetch_status(target: str, timeout_s: float = 2.0) -> dict[str, Any]:
    """Status of a running pager (its socket, or the directory of its store) or of a store at rest.

    Raises: ConfigError when there is neither at that place; TierUnavailableError when a pager is there but silent.
    """
    path = Path(target.removeprefix("unix://"))
    if path.is_socket():
        return _ask(path, timeout_s)
    if not path.exists():
        raise ConfigError(f"{path}: no such socket or store")
    if path.is_dir():
        live = path / STATUS_SOCKET
        if live.is_socket():
            try:
                return _ask(live, timeout_s)
            except TierUnavailableError:
                pass  # left behind by a pager that died; the store itself can still be read
        from ..tiers.nvme.status import read_store_status

        return {"version": VERSION, "source": "store", "store": read_store_status(path)}
    raise ConfigError(f"{path}: neither a socket of a pager nor the directory of a store")


def _ask(path: Path, timeout_s: float) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            connection.sendall(encode(STATUS_REQUEST, 1, {}))
            kind, _, body = read_frame(connection)
        except (OSError, EOFError) as error:
            raise TierUnavailableError(f"pager at {path} does not answer: {error}") from error
    if kind != STATUS_REPLY or not isinstance(body, dict):
        raise ProtocolError(f"pager at {path} answered with frame type {kind}")
    return body


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    parts, left = [], size
    while left:
        part = connection.recv(left)
        if not part:
            raise EOFError("connection closed in the middle of a frame")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
