"""A network and an event loop under a seed: bytes that come in pieces, late, or not at all, and time that only steps pass.

`VirtualLoop` is what the daemon asks of an event loop, `SimTransport` what it asks of a connection; both are given to the
real Connection and Service. Bytes of one direction stay in order and come once, as TCP and Unix sockets promise; how many
come at a time, when, and whether a reset takes the rest, the seed says.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from sim_events import Clock

from kvtier.pager.clients import Clients
from kvtier.pager.daemon.connection import Connection
from kvtier.pager.rules import Rules
from kvtier.tiers.errors import ConfigError


class _Handle:
    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self.is_cancelled = call, False

    def cancel(self) -> None:
        self.is_cancelled = True

    def run(self) -> None:
        if not self.is_cancelled:
            self._call()


class VirtualLoop:
    """Callbacks in order, timers by the virtual clock, and jobs of threads whenever the seed lets one run."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.ready: deque[_Handle] = deque()
        self.timers: list[tuple[float, int, _Handle]] = []
        self.jobs: list[Callable[[], None]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.clock()

    def get_debug(self) -> bool:
        return False

    def call_soon(self, call: Callable[..., object], *given: Any, context: Any = None) -> _Handle:
        handle = _Handle(lambda: call(*given))
        self.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay_s: float, call: Callable[..., object], *given: Any) -> _Handle:
        handle = _Handle(lambda: call(*given))
        heapq.heappush(self.timers, (self.clock() + delay_s, next(self._numbers), handle))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise context.get("exception") or AssertionError(str(context))

    def run_in_executor(self, _: Any, work: Callable[..., Any], *given: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.Future(loop=self)  # type: ignore[arg-type]

        def job() -> None:
            try:
                future.set_result(work(*given))
            except Exception as error:
                future.set_exception(error)

        self.jobs.append(job)
        return future

    def run_ready(self) -> None:
        self.ready.popleft().run()

    def run_due_timers(self) -> None:
        """Let time pass until the next timer, and run it."""
        if self.timers:
            due_s, _, handle = heapq.heappop(self.timers)
            self.clock.now_s = max(self.clock.now_s, due_s)
            handle.run()


class SimTransport:
    """One connection, both directions. The client's end is `to_daemon` and `take`."""

    def __init__(self, loop: VirtualLoop, protocol: Connection) -> None:
        self._loop, self._protocol = loop, protocol
        self.to_daemon, self._to_client = bytearray(), bytearray()
        self._high, self._is_full = 1 << 16, False
        self._is_reading, self._is_closing = True, False
        self.is_over = self._is_broken = False

    # ------------------------------------------------------------------ what asyncio gives a protocol
    def set_write_buffer_limits(self, high: int) -> None:
        self._high = high

    def get_extra_info(self, name: str) -> None:
        """No real socket is behind it."""

    def get_write_buffer_size(self) -> int:
        return len(self._to_client)

    def is_reading(self) -> bool:
        return self._is_reading

    def is_closing(self) -> bool:
        return self._is_closing

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        self._is_reading = True

    def write(self, data: bytes) -> None:
        if self._is_broken:
            return
        self._to_client += data
        if len(self._to_client) > self._high and not self._is_full:
            self._is_full = True
            self._protocol.pause_writing()

    def close(self) -> None:
        """What was written still arrives."""
        if not self._is_closing:
            self._is_closing, self._is_reading = True, False
            if not self._to_client:
                self._loop.call_soon(self._end, None)

    def abort(self) -> None:
        self.reset()

    # ------------------------------------------------------------------ what the network does
    def can_deliver(self) -> bool:
        return bool(self.to_daemon) and self._is_reading and not self.is_over

    def deliver(self, most: int) -> int:
        """Some bytes reach the daemon."""
        into = self._protocol.get_buffer(-1)
        count = min(most, len(into), len(self.to_daemon))
        into[:count] = self.to_daemon[:count]
        del self.to_daemon[:count]
        self._protocol.buffer_updated(count)
        return count

    def take(self, most: int) -> bytes:
        """Some bytes reach the client."""
        data = bytes(self._to_client[:most])
        del self._to_client[:most]
        if self._is_full and len(self._to_client) <= self._high // 4:
            self._is_full = False
            self._protocol.resume_writing()
        if self._is_closing and not self._to_client:
            self._loop.call_soon(self._end, None)
        return data

    def reset(self) -> None:
        """The connection is gone, with all that was under way."""
        self._is_broken = self._is_closing = True
        self._is_reading = False
        self.to_daemon.clear()
        self._to_client.clear()
        self._loop.call_soon(self._end, ConnectionResetError())

    def _end(self, error: Exception | None) -> None:
        if not self.is_over:
            self.is_over = True
            self._protocol.connection_lost(error)


class SimProcesses(Clients):
    """Clients whose processes end when the simulation says so."""

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules)
        self.dead: set[int] = set()

    def attach(self, pid: int) -> int:
        if pid in self.dead:
            raise ConfigError(f"client pid={pid}: no such process")
        number = super().attach(os.getpid())
        self._by_id[number].pid = pid
        return number

    def reap(self) -> int:
        gone = [number for number, client in self._by_id.items() if client.pid in self.dead]
        for number in gone:
            self._let_go(number)
        return len(gone)
