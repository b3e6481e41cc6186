"""Disk calls with computing before and after them: three steps, done by two kinds of threads.

While every thread waits for the disk, others compute what the next calls need; a thread whose call returns makes the next
one at once. So a disk that gives back all it was asked for in one go, as those of virtual machines do, is not left idle while
its callers take turns at the interpreter's lock. Work that finds a thread of the disk idle is done by it from end to end: to
hand it over would only make it late.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from .errors import QueueFullError, TierUnavailableError
from .streams import Steps
from .workers import QUEUE_LIMIT, HostEvent, Workers

NUM_COMPUTING = min(4, len(os.sched_getaffinity(0)))  # each hashes faster than most disks give
AHEAD = 2  # calls made ready, in multiples of those under way: a disk may give all of them back at once


class StagedWorkers(Workers):
    """Workers of a disk, `count` calls at once, and threads that compute for them."""

    def __init__(self, name: str, count: int, notify: Callable[[], None]) -> None:
        super().__init__(name, count, notify)
        self._computing = Workers(f"{name}-sums", NUM_COMPUTING, notify)
        self._changed = threading.Condition(threading.Lock())
        self._limit = AHEAD * count
        self._waiting: deque[tuple[Steps, HostEvent]] = deque()
        self._under_way = 0  # begun and not over; at most the limit
        self._is_over = False  # nothing new is taken

    def has_backlog(self) -> bool:
        return self._under_way > self.num_threads or super().has_backlog()

    def submit_steps(self, steps: Steps) -> HostEvent:
        """Queue work whose three steps run in turn. Raises as `submit` does; what a step raises ends the work."""
        event = HostEvent()
        with self._changed:
            if self._is_over:
                raise TierUnavailableError(f"queue {self._name!r} is closed")
            if len(self._waiting) >= QUEUE_LIMIT:
                raise QueueFullError(f"queue {self._name!r} full: {QUEUE_LIMIT} operations wait; retry when some end")
            if self._under_way >= self._limit:
                self._waiting.append((steps, event))
                return event
            self._under_way += 1
            finds_one_idle = self._under_way <= self.num_threads
        try:
            if finds_one_idle:
                self.submit_silently(partial(self._do_all, steps, event))
            else:
                self._computing.submit_silently(partial(self._begin, steps, event))
        except (QueueFullError, TierUnavailableError):
            self._let_in()
            raise
        return event

    def close(self, timeout_s: float) -> None:
        """Let what is queued run, then end the threads."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._is_over = True
            self._changed.wait_for(lambda: not self._under_way, timeout_s)
        super().close(max(0.0, deadline_s - time.monotonic()))
        self._computing.close(max(0.0, deadline_s - time.monotonic()))

    # ------------------------------------------------------------------ inside
    def _do_all(self, steps: Sequence[Callable[[], None]], event: HostEvent) -> None:
        error: BaseException | None = None
        try:
            for step in steps:
                step()
        except BaseException as raised:  # the waiter handles it, as that of any other work
            error = raised
        self._end(event, error)

    def _begin(self, steps: Steps, event: HostEvent) -> None:
        try:
            steps[0]()
            self.submit_silently(partial(self._call, steps, event))
        except BaseException as error:
            self._end(event, error)

    def _call(self, steps: Steps, event: HostEvent) -> None:
        """Nothing but the call: this thread's next one is waiting."""
        try:
            steps[1]()
            self._computing.submit_silently(partial(self._do_all, steps[2:], event))
        except BaseException as error:
            self._end(event, error)

    def _end(self, event: HostEvent, error: BaseException | None) -> None:
        event.finish(error)
        self._notify()
        self._let_in()

    def _let_in(self) -> None:
        """The next work that waits takes the place of one that is over."""
        while (following := self._next()) is not None:
            steps, event = following
            try:
                self._computing.submit_silently(partial(self._begin, steps, event))
                return
            except TierUnavailableError as closed:  # closing took too long: nobody will do this
                event.finish(closed)
                self._notify()

    def _next(self) -> tuple[Steps, HostEvent] | None:
        with self._changed:
            if self._waiting:
                return self._waiting.popleft()
            self._under_way -= 1
            self._changed.notify_all()
            return None
