"""Completions: events that must be asked, and the one thread that asks.

Knows no device: an event is anything with `query` and `synchronize`. Guards the waiters: a failing device ends an event
with an error, and nothing that was watched is forgotten.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from .errors import TierUnavailableError
from .streams import Verdict

SHORTEST_LOOK_S, LONGEST_LOOK_S = 50e-6, 500e-6  # between two looks while something is under way


class Native(Protocol):
    """What a device library's event can do."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class PolledEvent:
    """Event of a device. Keeps the memory of its copies alive until somebody saw that it is done.

    Then it asks the verdicts of the work before it; the first error is its own.
    """

    __slots__ = ("_is_done", "_verdicts", "error", "keeps", "native")

    def __init__(
        self,
        native: Native,
        error: BaseException | None = None,
        keeps: object = None,
        verdicts: tuple[Verdict, ...] = (),
    ) -> None:
        self.native = native
        self.error = error
        self.keeps = keeps
        self._verdicts = verdicts
        self._is_done = False

    def is_done(self) -> bool:
        if not self._is_done:
            try:
                self._finish(self.native.query())
            except RuntimeError as error:
                self.fail(error)
        return self._is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        if timeout_s is None and not self.is_done():
            try:
                self.native.synchronize()
                self._finish(True)
            except RuntimeError as error:
                self.fail(error)
        deadline_s, pause_s = time.monotonic() + (timeout_s or 0.0), SHORTEST_LOOK_S
        while not self.is_done():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        return True

    def fail(self, cause: BaseException) -> None:
        """End with an error: the device cannot say any more what became of the work."""
        if self.error is None:
            self.error = unavailable("device", cause)
        self._finish(True)

    def _finish(self, is_done: bool) -> None:
        if is_done:
            for verdict in self._verdicts if self.error is None else ():
                self.error = self.error or verdict()
            self._is_done = True  # after the error: another thread may look
            self.keeps = None


class Pending(threading.local):
    """What one thread has queued on a stream since it last recorded an event there."""

    error: BaseException | None = None
    keeps: tuple[object, ...] = ()
    verdicts: tuple[Verdict, ...] = ()


class Completions:
    """Watches events, in order within a stream, and calls `notify` when some have ended. Parks when there are none."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._watched: dict[str, deque[PolledEvent]] = {}
        self._wake = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kvtier-completions", daemon=True)
        self._thread.start()

    def add_stream(self, name: str) -> None:
        """Events of a stream end in the order in which they are watched; call before the first."""
        self._watched = {**self._watched, name: deque()}

    def watch(self, stream: str, event: PolledEvent) -> None:
        self._watched[stream].append(event)
        self._wake.set()

    def close(self, timeout_s: float) -> None:
        """End the thread once nothing is under way any more, or at the timeout."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        pause_s = SHORTEST_LOOK_S
        while True:
            if not any(self._watched.values()):
                if self._is_closing:
                    return
                self._wake.wait()
                self._wake.clear()
                continue
            if self._collect():
                self._notify()
                pause_s = SHORTEST_LOOK_S
            else:
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)

    def _collect(self) -> int:
        count = 0
        for events in self._watched.values():
            while events and events[0].is_done():
                events.popleft()
                count += 1
        return count


def unavailable(what: str, cause: BaseException) -> TierUnavailableError:
    """Our error for a failure of a device library."""
    error = TierUnavailableError(f"{what}: {cause}")
    error.__cause__ = cause
    return error
