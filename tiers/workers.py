"""Threads that do what would block: events that end once, jobs that several may do, and a queue with its workers.

A worker never dies of the work it is given: what that raises becomes the event's error.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from .errors import QueueFullError, TierUnavailableError

QUEUE_LIMIT = 1 << 16  # operations waiting in one queue
SHARED_BY = 2  # workers that are woken for shared jobs


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
