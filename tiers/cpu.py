"""CPU backend: one worker thread per copy stream, thread pools for disk; computing happens in the caller's own thread.

For tests, `poison=True` fills a target before its copy and `delay_s` makes every copy late.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .streams import DONE, POISON, Event, IntArray, Rows, aligned_rows, copy_rows_now

READ_WORKERS, WRITE_WORKERS = 4, 2
QUEUE_LIMIT = 1 << 16


class HostEvent:
    """Set by a worker."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.error: BaseException | None = None

    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._done.wait(timeout_s)

    def finish(self, error: BaseException | None = None) -> None:
        self.error = error
        self._done.set()


class Workers:
    """Long-lived threads that take (work, event) from one queue, in order of submission."""

    def __init__(self, name: str, count: int, notify: Callable[[], None]) -> None:
        self._queue: queue.Queue[tuple[Callable[[], None], HostEvent] | None] = queue.Queue(QUEUE_LIMIT)
        self._notify = notify
        self._threads = [threading.Thread(target=self._run, name=f"kvtier-{name}-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[[], None]) -> HostEvent:
        event = HostEvent()
        self._queue.put((fn, event))
        return event

    def close(self, timeout_s: float) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            fn, event = item
            try:
                fn()
            except BaseException as error:  # the waiter raises or handles it; a worker must live on
                event.finish(error)
            else:
                event.finish()
            self._notify()


class CpuStream:
    """A copy stream: one thread, first in, first out. A failed copy marks the events recorded after it."""

    def __init__(self, name: str, notify: Callable[[], None], *, poison: bool, delay_s: float) -> None:
        self.name = name
        self._workers = Workers(name, 1, notify)
        self._poison, self._delay_s = poison, delay_s
        self._error: BaseException | None = None  # of the copies since the last record

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        t, s = np.array(target_rows), np.array(source_rows)  # the caller may change its arrays

        def copy() -> None:
            if self._poison:
                target[t] = POISON
            if self._delay_s:
                time.sleep(self._delay_s)
            copy_rows_now(target, t, source, s)

        self.run(copy)

    def run(self, fn: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                fn()
            except Exception as error:
                self._error = error

        self._workers.submit(guarded)

    def wait(self, event: Event) -> None:
        if not event.is_done():
            self.run(lambda: (event.wait(), None)[1])

    def record(self) -> HostEvent:
        def settle() -> None:
            error, self._error = self._error, None
            if error is not None:
                raise error

        return self._workers.submit(settle)

    def synchronize(self, timeout_s: float | None = None) -> bool:
        return self._workers.submit(lambda: None).wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        self._workers.close(timeout_s)


class CallerStream:
    """Computing on a CPU is what the caller does: everything submitted has happened already."""

    name = "compute"

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        copy_rows_now(target, target_rows, source, source_rows)

    def run(self, fn: Callable[[], None]) -> None:
        fn()

    def wait(self, event: Event) -> None:
        event.wait()

    def record(self) -> Event:
        return DONE

    def synchronize(self, timeout_s: float | None = None) -> bool:
        return True


class CpuBackend:
    """Memory and streams without a GPU."""

    name = "cpu"
    pinned = False

    def __init__(self, *, poison: bool = False, delay_s: float = 0.0) -> None:
        self._progress = threading.Event()
        self.on_progress: Callable[[], object] | None = None
        self.compute = CallerStream()
        self.promote = CpuStream("promote", self._notify, poison=poison, delay_s=delay_s)
        self.demote = CpuStream("demote", self._notify, poison=poison, delay_s=delay_s)
        self.read_io = Workers("read", READ_WORKERS, self._notify)
        self.write_io = Workers("write", WRITE_WORKERS, self._notify)

    def alloc_device(self, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        return aligned_rows(rows, row_bytes)

    def alloc_host(self, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        return aligned_rows(rows, row_bytes)

    def wait_any(self, timeout_s: float) -> None:
        self._progress.wait(timeout_s)
        self._progress.clear()

    def close(self, timeout_s: float) -> None:
        for part in (self.promote, self.demote, self.read_io, self.write_io):
            part.close(timeout_s)

    def _notify(self) -> None:
        self._progress.set()
        if self.on_progress is not None:
            self.on_progress()
