"""DaemonConnection: a blocking client, for any number of threads, with many requests in flight on one socket.

A thread of its own reads replies and hands each to who waits for it. When the socket ends, everybody who waits gets
TierUnavailableError at once, and `on_lost` is called; nothing here reconnects. The payload of a RAW reply goes straight to
where the caller wants it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from ...tiers.errors import Busy, KvTierError, ProtocolError, TierUnavailableError
from ..wire import messages
from ..wire.frames import HEADER, META_LENGTH, Fields, Header, meta_bytes, pack, pack_raw, parse_header, unpack
from ..wire.replies import reply_of
from .address import dial
from .transport import Transport

TIMEOUT_S = 10.0
# What these answer is ours from then on, and GOODBYE is not taken back: where no answer comes the socket ends, which the
# next connection settles. Slots that come too late are given back.
_TAKING = (messages.Lookup, messages.Commit, messages.Hold, messages.GetSession, messages.Goodbye)
_GIVING = (messages.Release, messages.Unhold, messages.DropSession)  # never taken back: CANCEL may come in time
_MOST_LATE = 1024  # requests given up that may still be answered
M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a client says of itself. `previous_*`: its attachment before, none of whose copies runs any more."""

    name: str = ""
    token: str = ""
    features: Sequence[str] = messages.FEATURES
    oldest_version: int = messages.OLDEST_VERSION
    newest_version: int = messages.VERSION
    previous_boot: bytes = b""
    previous_epoch: int = 0
    ca_file: str | None = None  # what the daemon's certificate is checked against, not said to it


@dataclass(slots=True)
class _Pending:
    future: Future[tuple[int, Fields]] = field(default_factory=Future)
    target: Sequence[memoryview] = ()
    message: object = None
    fds: list[int] = field(default_factory=list)


class Reply(Generic[M]):
    """To one request that was sent."""

    def __init__(self, connection: DaemonConnection, request_id: int, kind: type[M], pending: _Pending) -> None:
        self._connection, self._request_id, self._kind, self._pending = connection, request_id, kind, pending
        self._future = pending.future

    @property
    def is_over(self) -> bool:
        """Answered, or the daemon is gone: `result` would not wait."""
        return self._future.done()

    @property
    def is_in_doubt(self) -> bool:
        """The connection ended before an answer came; once it is over."""
        return self._future.cancelled() or self._future.exception() is not None

    def when_over(self, call: Callable[[], object]) -> None:
        """Call it then, from the thread that finds out; now, where it is over already."""
        self._future.add_done_callback(lambda _: call())

    def result(self, timeout_s: float = TIMEOUT_S) -> M:
        """Raises what the daemon answered; TierUnavailableError when it is gone or silent."""
        try:
            number, fields = self._future.result(timeout_s)
        except TimeoutError:
            if self._connection.give_up(self._request_id, self._pending):
                raise TierUnavailableError(
                    f"the daemon at {self._connection.address} did not answer in {timeout_s:.1f} s"
                ) from None
            number, fields = self._future.result(0.0)
        return reply_of(self._kind, number, fields)


class DaemonConnection:
    """Open with `DaemonConnection.open`."""

    def __init__(self, transport: Transport, address: str) -> None:
        self._transport, self.address = transport, address
        self._sending = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._late: dict[int, messages.Reserve | messages.Lease] = {}  # given up, and cancelled unless answered already
        self._guard = threading.Lock()  # of _pending and is_lost
        self._ids = itertools.count(1)
        self.is_lost = False
        self.on_lost: Callable[[], object] = lambda: None
        self.welcome = messages.Welcome(0, [], b"", 0, {}, False, 1, 1)
        self._slots = threading.BoundedSemaphore(1)
        self._reader = threading.Thread(target=self._read_all, name="kvtier-daemon-replies", daemon=True)
        self._reader.start()

    @classmethod
    def open(cls, address: str, greeting: Greeting | None = None, *, timeout_s: float = TIMEOUT_S) -> DaemonConnection:
        """Connect and say HELLO. Raises: ConfigError, TierUnavailableError, ProtocolError (versions, not let in)."""
        said = greeting or Greeting()
        connection = cls(dial(address, timeout_s, said.ca_file), address)
        hello = messages.Hello(
            said.oldest_version,
            said.newest_version,
            list(said.features),
            said.name,
            said.token,
            said.previous_boot,
            said.previous_epoch,
        )
        try:
            connection.welcome = connection.call(hello, messages.Welcome, timeout_s=timeout_s)
        except BaseException:
            connection.close()
            raise
        connection._slots = threading.BoundedSemaphore(max(1, connection.welcome.max_requests // 2))
        return connection

    @property
    def version(self) -> int:
        return self.welcome.version

    @property
    def epoch(self) -> int:
        return self.welcome.epoch

    # ------------------------------------------------------------------ calls
    def call(self, message: object, kind: type[M], *, timeout_s: float = TIMEOUT_S) -> M:
        """One request and its reply. Raises what the daemon answered; TierUnavailableError when it is gone or silent."""
        return self._exchange(message, kind, _Pending(), None, timeout_s)

    def begin(self, message: object, kind: type[M], payload: memoryview | None = None) -> Reply[M]:
        """Send a request now and ask for its reply later. The daemon serves what one client begins in that order."""
        return self._begin(message, kind, _Pending(), payload)

    def begin_read(self, message: messages.Read, target: Sequence[memoryview]) -> Reply[messages.Bytes]:
        """The payload of the reply goes to `target`, in order: memory that is the reply's until `result` returns."""
        return self._begin(message, messages.Bytes, _Pending(target=target), None)

    def call_patiently(self, message: object, kind: type[M], *, timeout_s: float = TIMEOUT_S) -> M:
        """As `call`, asking again while the daemon says that it is busy, until the time is up."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            left_s = deadline_s - time.monotonic()
            try:
                return self.call(message, kind, timeout_s=max(TIMEOUT_S, left_s))  # it is asked, not waited for
            except Busy as busy:
                if left_s <= busy.retry_after_s:
                    raise
                time.sleep(busy.retry_after_s)

    def call_for_fds(self, message: object, kind: type[M], *, timeout_s: float = TIMEOUT_S) -> tuple[M, list[int]]:
        """As `call`; and the descriptors that came with the reply, which are the caller's to close."""
        pending = _Pending()
        try:
            return self._exchange(message, kind, pending, None, timeout_s), pending.fds
        except BaseException:
            _close_all(pending.fds)
            raise

    def close(self) -> None:
        """Whoever waits for a reply gets TierUnavailableError."""
        self._transport.shut()
        if threading.current_thread() is not self._reader:
            self._reader.join(5.0)

    # ------------------------------------------------------------------ inside
    def _exchange(
        self, message: object, kind: type[M], pending: _Pending, payload: memoryview | None, timeout_s: float
    ) -> M:
        return self._begin(message, kind, pending, payload).result(timeout_s)

    def _begin(self, message: object, kind: type[M], pending: _Pending, payload: memoryview | None) -> Reply[M]:
        """Waits only while as many requests are in flight as the daemon wants at most."""
        slots = self._slots  # HELLO was sent under others than those that it is answered with
        slots.acquire()
        request_id = next(self._ids)
        pending.message = message
        pending.future.add_done_callback(lambda _: self._ended(request_id, slots))
        with self._guard:
            is_lost = self.is_lost
            if not is_lost:
                self._pending[request_id] = pending
        try:
            if is_lost:
                raise TierUnavailableError(f"the daemon at {self.address} is gone")
            self._send(request_id, message, payload)
        except BaseException:
            pending.future.cancel()
            raise
        return Reply(self, request_id, kind, pending)

    def _ended(self, request_id: int, slots: threading.BoundedSemaphore) -> None:
        """A request is over: answered, given up, or lost with the daemon. Called once for each."""
        with self._guard:
            self._pending.pop(request_id, None)
        slots.release()

    def _send(self, request_id: int, message: object, payload: memoryview | None) -> None:
        number: int = type(message).KIND  # type: ignore[attr-defined]
        fields = messages.to_fields(message)
        if payload is None:
            parts = [memoryview(pack(number, request_id, fields))]
        else:
            parts = [memoryview(pack_raw(number, request_id, fields, payload.nbytes)), payload]
        try:
            with self._sending:
                for part in parts:
                    self._transport.send(part)
        except OSError as error:
            self.close()  # half a frame may be out: nothing can follow it
            raise TierUnavailableError(f"the daemon at {self.address} is gone: {error}") from error

    def give_up(self, request_id: int, pending: _Pending) -> bool:
        """A late reply must find nobody. One with a payload cannot be told from what follows, one that gives us something
        must not be lost: then the socket ends. False where it came in this very moment.
        """
        asked = pending.message
        with self._guard:
            if isinstance(asked, messages.Reserve | messages.Lease):
                self._late[request_id] = asked
                if len(self._late) > _MOST_LATE:
                    del self._late[next(iter(self._late))]
        if not pending.future.cancel():
            with self._guard:
                self._late.pop(request_id, None)
            return False
        if pending.target or is_taking(asked):
            self.close()
            return True
        if isinstance(asked, _GIVING):
            return True
        with contextlib.suppress(KvTierError):
            self._send(next(self._ids), messages.Cancel(request_id), None)
        return True

    def _read_all(self) -> None:
        try:
            while True:
                self._read_frame()
        except (OSError, EOFError, KvTierError) as error:
            self._lost(error)

    def _read_frame(self) -> None:
        head, fds = _receive_with_fds(self._transport, HEADER.size)
        try:
            header = parse_header(head)
            with self._guard:
                pending = self._pending.get(header.request_id)
            fields = (
                self._read_raw(header, pending) if header.is_raw else unpack(_receive(self._transport, header.size))
            )
        except BaseException:
            _close_all(fds)
            raise
        if pending is None:
            _close_all(fds)
            if header.request_id == 0:
                raise ProtocolError(f"the daemon refused this connection: {fields.get('message')}")
            self._came_late(header, fields)
            return
        pending.fds.extend(fds)
        try:
            pending.future.set_result((header.kind, fields))
        except InvalidStateError:  # it timed out in this very moment
            self._came_late(header, fields)

    def _came_late(self, header: Header, fields: Fields) -> None:
        """An answer that nobody waits for any more."""
        with self._guard:
            asked = self._late.pop(header.request_id, None)
        if asked is None or header.kind not in (messages.Slots.KIND, messages.Leased.KIND):
            return
        slots = np.frombuffer(reply_of(messages.Slots, messages.Slots.KIND, fields).slots, "<i4")
        given = messages.Release(asked.epoch, asked.store, asked.group, slots[slots >= 0].tobytes())

        def give() -> None:
            with contextlib.suppress(KvTierError):
                self._send(next(self._ids), given, None)

        threading.Thread(target=give, daemon=True).start()  # who reads must not wait for who sends

    def _read_raw(self, header: Header, pending: _Pending | None) -> Fields:
        start = _receive(self._transport, META_LENGTH.size)
        size = meta_bytes(header, start)
        fields = unpack(_receive(self._transport, size))
        left = header.size - META_LENGTH.size - size
        target = pending.target if pending is not None else ()
        if left != sum(part.nbytes for part in target):
            raise ProtocolError(f"{left} bytes of blocks came where others were awaited")
        for part in target:
            _receive_into(self._transport, part)
        return fields

    def _lost(self, error: Exception) -> None:
        """Whoever waits learns why, where the daemon said why."""
        gone = TierUnavailableError(f"the daemon at {self.address} is gone")
        with self._guard:
            self.is_lost = True
            waiting, self._pending = list(self._pending.values()), {}
        self._transport.close()
        for pending in waiting:
            with contextlib.suppress(Exception):
                pending.future.set_exception(error if isinstance(error, ProtocolError) else gone)
        self.on_lost()


def is_taking(message: object) -> bool:
    """Whether its answer must not come too late."""
    return isinstance(message, _TAKING) and bool(getattr(message, "hold", getattr(message, "take", True)))


def wait_all(replies: Sequence[Reply[M]], timeout_s: float = TIMEOUT_S) -> list[M]:
    """Every reply has come, or its connection has ended, before the first failure is raised: whatever memory the requests
    named is nobody else's business from then on."""
    found: list[M] = []
    failed: KvTierError | None = None
    for reply in replies:
        try:
            found.append(reply.result(timeout_s))
        except KvTierError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return found


def _receive_with_fds(transport: Transport, size: int) -> tuple[bytes, list[int]]:
    """Descriptors come with the first byte of a frame."""
    data, fds = transport.receive_with_fds(size)
    if not data:
        raise EOFError("connection closed")
    return data + _receive(transport, size - len(data)), fds


def _receive(transport: Transport, size: int) -> bytes:
    found = bytearray(size)
    _receive_into(transport, memoryview(found))
    return bytes(found)


def _receive_into(transport: Transport, target: memoryview) -> None:
    while target.nbytes:
        count = transport.receive_into(target)
        if not count:
            raise EOFError("connection closed in the middle of a frame")
        target = target[count:]


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
