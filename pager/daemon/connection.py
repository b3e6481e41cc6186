"""Connection: one client's socket. Frames in, replies out, limits on both; what a message means is the service's business.

Reads straight into one buffer (asyncio BufferedProtocol); the payload of a WRITE goes straight into its slot. Guards the
daemon against its peers: frames before HELLO are small, requests and bytes in flight are bounded, of one connection and of
all together (then the socket is not read), and a peer that does not read its replies is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from ...tiers.errors import Busy, KvTierError, ProtocolError
from ..wire import messages
from ..wire.frames import (
    HEADER,
    MAX_CONTROL_BYTES,
    MAX_STRANGER_BYTES,
    META_LENGTH,
    Header,
    meta_bytes,
    pack,
    pack_raw,
    parse_header,
)

HIGH_WATER_BYTES = 1 << 20  # of replies that the peer has not read
UNREAD_S = 10.0  # so long may it leave more than that
_FIRST_BUFFER = 1 << 16
_KEPT_BUFFER = 8 * _FIRST_BUFFER  # a look-up of 8,192 keys is a little over 256 KiB: made once while they keep coming
_PEER = struct.Struct("3i")
_SO_PEERGROUPS, _MAX_GROUPS = 59, 255  # <asm-generic/socket.h>; getsockopt of Python gives 1 KiB at most
_LOG = logging.getLogger("kvtier.pagerd")


class Handler(Protocol):
    """Who serves the requests of connections. `*_in_flight`: what one connection may have, not answered yet."""

    requests_in_flight: int
    bytes_in_flight: int

    def connected(self, connection: Connection) -> None: ...

    def received(self, connection: Connection, header: Header, body: bytes, payload_bytes: int) -> memoryview | None:
        """A whole frame; or the start of a RAW one, and where its payload shall go (None: nowhere)."""

    def may_take(self, connection: Connection, nbytes: int) -> bool:
        """Whether there is room for a large frame now; if not, `let_in` is called when there is."""

    def payload_done(self, connection: Connection, header: Header) -> None: ...

    def drained(self) -> None:
        """A peer has read what there was for it."""

    def disconnected(self, connection: Connection) -> None: ...


class Connection(asyncio.BufferedProtocol):
    """State of one socket; `attachment` and `tenant` are the service's."""

    def __init__(self, handler: Handler, loop: asyncio.AbstractEventLoop) -> None:
        self._handler, self._loop = handler, loop
        self._buffer = bytearray(_FIRST_BUFFER)
        self._used = 0
        self._has_heard = False  # since `rest` looked
        self._target: memoryview | None = None  # rest of a payload that goes elsewhere
        self._skip = 0  # rest of a payload that goes nowhere
        self._raw: Header | None = None
        self._is_let_in, self._is_held_up = False, False  # the large frame that is coming in
        self._in_flight: dict[int, int] = {}  # request id -> bytes of its frame
        self._drop_timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.socket: socket.socket | None = None
        self._waiting: deque[Callable[[], None]] = deque()  # large replies, until the peer has read what it has
        self._is_full = False
        self.pid, self.uid = -1, -1
        self.gids: frozenset[int] = frozenset()  # of the peer's process, as the kernel says
        self.host = ""  # of a peer on another machine
        self.version = 0  # 0 until HELLO
        self.cancelled: set[int] = set()
        self.is_closed = False

    # ------------------------------------------------------------------ asyncio
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self.socket = transport.get_extra_info("socket")
        if self.socket is not None and self.socket.family == socket.AF_UNIX:
            peer = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            self.pid, self.uid, gid = _PEER.unpack(peer)
            self.gids = frozenset({gid, *_groups(self.socket)})
        elif self.socket is not None:
            _notice_silence(self.socket)
            self.host = str((transport.get_extra_info("peername") or [""])[0])
        self._handler.connected(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._target is not None:
            return self._target
        return memoryview(self._buffer)[self._used :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._target is not None:
            self._fill(nbytes)
            return
        self._used += nbytes
        self._has_heard = True
        try:
            start = self._take_frames()
        except ProtocolError as error:
            self._refuse(error)
            return
        self._keep_from(start)

    def pause_writing(self) -> None:
        self._is_full = True
        if self._transport is not None:
            self._transport.pause_reading()
        self._drop_timer = self._loop.call_later(UNREAD_S, self._drop_silent)

    def resume_writing(self) -> None:
        self._is_full = False
        if self._drop_timer is not None:
            self._drop_timer.cancel()
            self._drop_timer = None
        while self._waiting and not self._is_full and not self.is_closed:
            self._waiting.popleft()()
        self._handler.drained()
        self._read_on()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        self._waiting.clear()
        self.resume_writing()
        self._handler.disconnected(self)

    # ------------------------------------------------------------------ frames in
    def _take_frames(self) -> int:
        """Hand over every whole frame in the buffer; returns where the rest begins."""
        start = 0
        while not self.is_closed and self._target is None:
            if self._skip:
                skipped = min(self._skip, self._used - start)
                self._skip -= skipped
                start += skipped
                if self._skip:
                    break
                self._end_payload()
            if self._used - start < HEADER.size:
                break
            limit = MAX_CONTROL_BYTES if self.version else MAX_STRANGER_BYTES
            header = parse_header(self._buffer, limit=limit, offset=start)
            taken = self._take_raw(header, start) if header.is_raw else self._take_whole(header, start)
            if not taken:
                break
            start += taken
        return start

    def _take_whole(self, header: Header, start: int) -> int:
        if not self._may_take(HEADER.size + header.size):
            return 0
        end = start + HEADER.size + header.size
        if self._used < end:
            self._reach(start, HEADER.size + header.size)
            return 0
        self._is_let_in = False
        self._note(header, HEADER.size + header.size)
        self._handler.received(self, header, bytes(memoryview(self._buffer)[start + HEADER.size : end]), 0)
        return end - start

    def _take_raw(self, header: Header, start: int) -> int:
        """The map of a raw frame; then the payload is led to where it belongs."""
        begin = start + HEADER.size + META_LENGTH.size
        if self._used < begin:
            return 0
        size = meta_bytes(header, self._buffer, offset=start + HEADER.size)
        if not self._may_take(begin - start + size):
            return 0
        if self._used < begin + size:
            self._reach(start, begin - start + size)
            return 0
        self._is_let_in = False
        payload = header.size - META_LENGTH.size - size
        self._raw = header
        self._note(header, payload)
        view = memoryview(self._buffer)
        target = self._handler.received(self, header, bytes(view[begin : begin + size]), payload)
        here = min(payload, self._used - begin - size)
        if target is None:
            self._skip = payload
            if not payload:
                self._end_payload()
            return begin + size - start
        target[:here] = view[begin + size : begin + size + here]
        if here < payload:
            self._target = target[here:payload]
        else:
            self._end_payload()
        return begin + size + here - start

    def _fill(self, nbytes: int) -> None:
        assert self._target is not None
        self._target = self._target[nbytes:]
        if not len(self._target):
            self._target = None
            self._end_payload()

    def _end_payload(self) -> None:
        assert self._raw is not None
        header, self._raw = self._raw, None
        self._handler.payload_done(self, header)

    def _reach(self, start: int, size: int) -> None:
        """Make the buffer large enough for the frame that begins at `start`; at most a control frame."""
        if start + size > len(self._buffer) and size > len(self._buffer):
            self._buffer = self._buffer + bytearray(size - len(self._buffer))

    def _may_take(self, size: int) -> bool:
        """Asked once for each large frame, before it has come. Where there is no room for it the socket is not read."""
        if size > _FIRST_BUFFER and not self._is_let_in:
            self._is_let_in = self._handler.may_take(self, size)
            self._is_held_up = not self._is_let_in
        if self._is_held_up and self._transport is not None:
            self._transport.pause_reading()
        return not self._is_held_up

    def let_in(self) -> None:
        """There is room now for the large frame that was held up."""
        self._is_let_in, self._is_held_up = True, False
        self.buffer_updated(0)
        self._read_on()

    @property
    def buffer_bytes(self) -> int:
        """Beyond what every connection has, for the large frame that comes in."""
        return len(self._buffer) - _FIRST_BUFFER

    @property
    def request_bytes(self) -> int:
        """Of requests that are not answered; a payload goes straight into its slot."""
        payload = 0 if self._raw is None else self._in_flight.get(self._raw.request_id, 0)
        return sum(self._in_flight.values()) - payload

    def _keep_from(self, start: int) -> None:
        rest = self._used - start
        if start and rest:
            self._buffer[:rest] = self._buffer[start : self._used]
        self._used = rest
        if not rest and len(self._buffer) > _KEPT_BUFFER:
            self._buffer = bytearray(_FIRST_BUFFER)

    def rest(self) -> None:
        """Called now and then: who sent nothing since the last time needs no large buffer."""
        if not self._has_heard and not self._used:
            self._buffer = self._buffer if len(self._buffer) == _FIRST_BUFFER else bytearray(_FIRST_BUFFER)
        self._has_heard = False

    # ------------------------------------------------------------------ limits
    def _note(self, header: Header, nbytes: int) -> None:
        if header.kind == messages.Cancel.KIND:
            return
        if header.request_id in self._in_flight:
            raise ProtocolError(f"request id {header.request_id} is in flight already")
        self._in_flight[header.request_id] = nbytes
        if self._is_over() and self._transport is not None:
            self._transport.pause_reading()

    def _is_over(self) -> bool:
        """A payload that is coming in has its room already, and must not stop itself."""
        limits = self._handler
        return len(self._in_flight) >= limits.requests_in_flight or self.request_bytes > limits.bytes_in_flight

    def _answered(self, request_id: int) -> None:
        self._in_flight.pop(request_id, None)
        self.cancelled.discard(request_id)
        self._read_on()

    def _read_on(self) -> None:
        """Read the socket again once there is room, for requests and for their replies."""
        if self._transport is None or self.is_closed or self._transport.is_closing():
            return
        if self._is_full or self._is_held_up or self._is_over():
            return
        if not self._transport.is_reading():
            self._transport.resume_reading()

    def _drop_silent(self) -> None:
        _LOG.warning("event=drop_client pid=%d reason=does_not_read", self.pid)
        self.close()

    # ------------------------------------------------------------------ replies
    def reply(self, request_id: int, message: object) -> None:
        self._send(request_id, pack(_kind(message), request_id, messages.to_fields(message)))

    def reply_raw(self, request_id: int, message: object, payload: bytes) -> None:
        """`payload` is a copy: a slot may be reused before the peer has read the last byte."""
        frame = pack_raw(_kind(message), request_id, messages.to_fields(message), len(payload))
        self._send(request_id, frame, payload)

    def when_read(self, send: Callable[[], None]) -> None:
        """Call `send` once the peer has read most of its replies: large ones do not pile up here."""
        if self._is_full:
            self._waiting.append(send)
        else:
            send()

    def reply_with_fds(self, request_id: int, message: object, fds: list[int]) -> None:
        """Only where nothing else waits to be written: descriptors travel with the first byte of the frame.

        Raises: ProtocolError when the socket takes no more right now.
        """
        frame = pack(_kind(message), request_id, messages.to_fields(message))
        assert self._transport is not None
        if self._transport.get_write_buffer_size():
            raise ProtocolError("OPEN with replies still unread; read them first")
        fileno = self._transport.get_extra_info("socket").fileno()
        with socket.socket(fileno=os.dup(fileno)) as own:
            own.setblocking(False)
            try:
                sent = socket.send_fds(own, [frame], fds)
            except BlockingIOError:
                raise ProtocolError("OPEN with replies still unread; read them first") from None
        if sent < len(frame):
            self._transport.write(frame[sent:])
        self._answered(request_id)

    def fail(self, request_id: int, error: KvTierError) -> None:
        retry_ms = max(1, int(error.retry_after_s * 1000)) if isinstance(error, Busy) else 0
        self.reply(request_id, messages.Failure(error.code, str(error)[:2000], retry_ms))

    @property
    def unsent_bytes(self) -> int:
        return 0 if self._transport is None or self.is_closed else self._transport.get_write_buffer_size()

    def send_frame(self, request_id: int, frame: bytes) -> None:
        """A reply that is packed already."""
        self._send(request_id, frame)

    def cancel(self, request_id: int) -> None:
        """Nobody waits for that reply any more."""
        if request_id in self._in_flight:
            self.cancelled.add(request_id)

    def drop_reply(self, request_id: int) -> None:
        self._answered(request_id)

    def close(self) -> None:
        self._target = None  # whose slot may be somebody else's from now on
        if self._transport is not None and not self.is_closed:
            self._transport.abort()

    def send_away(self, error: KvTierError) -> None:
        """Close; whoever waits for an answer is told why there is none."""
        for request_id in list(self._in_flight):
            self.fail(request_id, error)
        self.close()

    def _refuse(self, error: ProtocolError) -> None:
        """What follows in the stream cannot be trusted: say why and close."""
        _LOG.warning("event=protocol_error pid=%d reason=%s", self.pid, error)
        self.refuse(error)

    def refuse(self, error: KvTierError) -> None:
        """Say why, and close."""
        self.fail(0, error)
        self.is_closed, self._target = True, None
        if self._transport is not None:
            self._transport.close()

    def _send(self, request_id: int, frame: bytes, payload: bytes = b"") -> None:
        if not self.is_closed and request_id not in self.cancelled and self._transport is not None:
            self._transport.write(frame)
            if payload:
                self._transport.write(payload)
        self._answered(request_id)


def _notice_silence(peer: socket.socket) -> None:
    """A machine that is gone without a word keeps what it held for a minute, not for ever."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        peer.setsockopt(socket.IPPROTO_TCP, option, seconds)


def _groups(peer: socket.socket) -> tuple[int, ...]:
    """Supplementary groups of the process at the other end; none where the kernel does not say."""
    try:
        raw = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError:
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)


def _kind(message: object) -> int:
    kind: int = type(message).KIND  # type: ignore[attr-defined]
    return kind
