"""CPU backend: one worker thread per copy stream, thread pools for disk; computing happens in the caller's own thread.

A worker never dies of the work it is given: what that raises becomes the event's error. For tests, `poison=True` fills
a target before its copy and `delay_s` makes every copy late.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .errors import QueueFullError, TierUnavailableError
from .memory import aligned_rows
from .streams import DONE, POISON, Event, IntArray, Progress, Rows, copy_rows_now

# Requests in flight on the disk, each way; threads that wait cost no core. Eight fill a disk when nothing is done between
# two requests; ours are checked in between.
IO_DEPTH = 12
QUEUE_LIMIT = 1 << 16  # operations waiting in one queue
# From here on two threads copy: one reaches half of the memory's rate with 2 MiB pieces. A stream's chunk is smaller: beside
# it somebody computes, and needs the other core more.
SHARED_COPY_BYTES = 12 << 20
SHARED_BY = 2  # workers that are woken for shared jobs
_LOOK_S = 0.2  # how often a worker that waits for another looks whether it should end


class HostEvent:
    """Set once by a worker. One bare lock, because thousands a second are made: held until the work is done."""

    __slots__ = ("_is_done", "_lock", "error")

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._is_done = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_done(self) -> bool:
        return self._is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        if self._is_done:
            return True
        if not self._lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
            return self._is_done
        self._lock.release()
        return True

    def finish(self, error: BaseException | None = None) -> None:
        self.error = error
        self._is_done = True
        self._lock.release()


class SharedJobs:
    """Jobs of one piece of work, done by workers and by whoever waits for it: to be woken costs as long as a small read."""

    def __init__(self, jobs: list[Callable[[], None]], notify: Callable[[], None]) -> None:
        self._jobs = deque(jobs)
        self._left, self._lock = len(jobs), threading.Lock()
        self._error: BaseException | None = None
        self._done, self._notify = HostEvent(), notify

    @property
    def error(self) -> BaseException | None:
        return self._done.error

    def is_done(self) -> bool:
        return self._done.is_done()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Do what no worker has begun, then wait for the rest. A timeout is for the waiting only."""
        self.help()
        return self._done.wait(timeout_s)

    def help(self) -> None:
        """Do jobs until none is left to begin."""
        while self._jobs:
            try:
                job = self._jobs.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                job()
            except BaseException as raised:
                self._error = raised
                if not isinstance(raised, Exception):  # an interrupt is meant for the thread, whoever does the job
                    raise
            finally:
                self._end_one()

    def _end_one(self) -> None:
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            self._done.finish(self._error)
            self._notify()


class Workers:
    """Long-lived threads that take (work, event) from one queue, in order of submission."""

    def __init__(self, name: str, count: int, notify: Callable[[], None]) -> None:
        self._name, self._notify = name, notify
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], HostEvent | None] | None] = queue.SimpleQueue()
        self.is_closing = False
        self._gate = threading.Lock()  # nothing enters the queue behind the last None
        self._threads = [
            threading.Thread(target=self._run, name=f"kvtier-{name}-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_threads(self) -> int:
        return len(self._threads)

    def submit(self, fn: Callable[[], None]) -> HostEvent:
        """Queue a call. Raises QueueFullError when far too much waits, TierUnavailableError after close."""
        event = HostEvent()
        self._put(fn, event)
        return event

    def has_backlog(self) -> bool:
        return not self._queue.empty()

    def submit_shared(self, jobs: list[Callable[[], None]]) -> SharedJobs:
        """Queue jobs, at least one, that belong together and that the waiter may do. Raises as `submit` does."""
        shared = SharedJobs(jobs, self._notify)
        self._put(shared.help, None)
        with contextlib.suppress(QueueFullError, TierUnavailableError):  # one worker, or the waiter, will do
            for _ in range(min(SHARED_BY, len(jobs) - 1) - 1):  # the last job is for who waits
                self._put(shared.help, None)
        return shared

    def submit_silently(self, fn: Callable[[], None]) -> None:
        """Queue a call that nobody waits for and that wakes nobody."""
        self._put(fn, None)

    def close(self, timeout_s: float) -> None:
        """Let what is queued run, then end the threads."""
        deadline_s = time.monotonic() + timeout_s
        with self._gate:
            if self.is_closing:
                return
            self.is_closing = True
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _put(self, fn: Callable[[], None], event: HostEvent | None) -> None:
        with self._gate:
            if self.is_closing:
                raise TierUnavailableError(f"queue {self._name!r} is closed")
            if self._queue.qsize() >= QUEUE_LIMIT:
                raise QueueFullError(f"queue {self._name!r} full: {QUEUE_LIMIT} operations wait; retry when some end")
            self._queue.put((fn, event))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            fn, event = item
            del item
            error: BaseException | None = None
            try:
                fn()
            except BaseException as raised:  # the waiter handles it; a worker must live on
                error = raised
            del fn
            if event is not None:
                event.finish(error)
                del event
                self._notify()


class CpuStream:
    """A copy stream: one thread, first in, first out, and a helper for large copies.

    A failed copy marks the event recorded after it.
    """

    def __init__(self, name: str, notify: Callable[[], None], *, poison: bool, delay_s: float) -> None:
        self.name = name
        self._workers = Workers(name, 1, notify)
        self._helper = Workers(f"{name}-helper", 1, notify)
        self._poison, self._delay_s = poison, delay_s
        self._error: BaseException | None = None  # of the work since the last record

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        t, s = np.array(target_rows), np.array(source_rows)  # the caller may change its arrays

        def copy() -> None:
            if self._poison:
                target[t] = POISON
            if self._delay_s:
                time.sleep(self._delay_s)
            if len(t) > 1 and target[0].nbytes * len(t) >= SHARED_COPY_BYTES:
                half = len(t) // 2
                other = self._helper.submit(lambda: copy_rows_now(target, t[half:], source, s[half:]))
                copy_rows_now(target, t[:half], source, s[:half])
                other.wait()
                if other.error is not None:
                    raise other.error
            else:
                copy_rows_now(target, t, source, s)

        self.run(copy)

    def run(self, fn: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                fn()
            except Exception as error:
                self._error = self._error or error

        self._workers.submit_silently(guarded)

    def wait(self, event: Event) -> None:
        if event.is_done():
            return

        def until_done() -> None:
            while not event.wait(_LOOK_S):
                if self._workers.is_closing:
                    raise TierUnavailableError(f"stream {self.name}: closed while waiting for another stream")

        self.run(until_done)

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
        self._helper.close(timeout_s)


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
    near_node = None

    def __init__(
        self, *, poison: bool = False, delay_s: float = 0.0, io_depth: int = IO_DEPTH, reads_host: bool = True
    ) -> None:
        """Without `reads_host` it does as where the device has memory of its own; for tests and measurements."""
        self.reads_host = reads_host
        self._progress = Progress()
        notify = self._progress.notify
        self.compute = CallerStream()
        self.promote = CpuStream("promote", notify, poison=poison, delay_s=delay_s)
        self.demote = CpuStream("demote", notify, poison=poison, delay_s=delay_s)
        self.read_io = Workers("read", io_depth, notify)
        self.write_io = Workers("write", io_depth, notify)

    @property
    def on_progress(self) -> Callable[[], object] | None:
        return self._progress.callback

    @on_progress.setter
    def on_progress(self, callback: Callable[[], object] | None) -> None:
        self._progress.callback = callback

    def alloc_device(self, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        return aligned_rows(rows, row_bytes)

    def alloc_host(self, rows: int, row_bytes: int, *, huge_pages: str = "auto") -> npt.NDArray[np.uint8]:
        return aligned_rows(rows, row_bytes, huge_pages=huge_pages)

    def pin(self, rows: Rows) -> bool:
        return False

    def unpin(self, rows: Rows) -> None:
        pass

    def wait_any(self, timeout_s: float) -> None:
        self._progress.wait_any(timeout_s)

    def notify(self) -> None:
        self._progress.notify()

    def close(self, timeout_s: float) -> None:
        for part in (self.promote, self.demote, self.read_io, self.write_io):
            part.close(timeout_s)
