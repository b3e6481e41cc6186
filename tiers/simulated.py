"""Simulated backend: one thread, a seeded scheduler, asynchronous streams, every copy in two steps (poison, bytes).

Whoever waits makes the scheduler run operations, picked by the seed among all that may run: the heads of the streams
whose waits are over, and any queued disk call. Same seed, same order; `on_step` hears of every step by the name of its
stream or queue. A disk call that fails or a copy that is made to fail shows in its event; what a stand-in kernel on the
compute stream raises is a test's own mistake and is raised.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .memory import aligned_rows
from .streams import POISON, AllDone, Event, IntArray, Rows, Steps, Work, copy_rows_now

Step = Callable[[], bool]  # runs once more; True when the operation is over


class SimulatedEvent:
    """Done when the scheduler has run past it. Does not keep its backend: arrays of pages hold events, and what they hold the
    garbage collector does not see, so a pager that ended in the middle of a copy would stay for ever, and its memory."""

    def __init__(self, backend: SimulatedBackend) -> None:
        self._backend = weakref.proxy(backend)
        self._is_done = False
        self.error: BaseException | None = None

    def is_done(self) -> bool:
        return self._is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        while not self._is_done and self._backend.run_one():
            pass
        return self._is_done

    def finish(self, error: BaseException | None = None) -> None:
        self._is_done, self.error = True, error


class SimulatedStream:
    """A queue of operations; the head runs when its waits are done and the seed picks it."""

    def __init__(self, name: str, backend: SimulatedBackend) -> None:
        self.name = name
        self._backend = backend
        self.queue: deque[tuple[list[Event], Step]] = deque()
        self._waits: list[Event] = []
        self._error: BaseException | None = None

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        t, s = np.array(target_rows), np.array(source_rows)
        steps = iter(range(2))

        def step() -> bool:
            if next(steps) == 0:
                failure = self._backend.take_failure(self.name)
                if failure is not None:
                    self._error = failure
                    return True
                target[t] = POISON
                return False
            copy_rows_now(target, t, source, s)
            return True

        self._push(step)

    def run(self, fn: Work) -> None:
        def step() -> bool:
            try:
                fn()
            except Exception as error:
                if self is self._backend.compute:
                    raise
                self._error = error
            return True

        self._push(step)

    def wait(self, event: Event) -> None:
        self._waits.append(event)

    def record(self) -> SimulatedEvent:
        event = SimulatedEvent(self._backend)

        def step() -> bool:
            error, self._error = self._error, None
            event.finish(error)
            return True

        self._push(step)
        return event

    def synchronize(self, timeout_s: float | None = None) -> bool:
        return self.record().wait(timeout_s)

    def is_ready(self) -> bool:
        return bool(self.queue) and all(event.is_done() for event in self.queue[0][0])

    def step(self) -> None:
        """Run the head once more; it leaves the queue when it is over or raises."""
        waits, run = self.queue.popleft()
        if not run():
            self.queue.appendleft((waits, run))

    def _push(self, step: Step) -> None:
        waits, self._waits = self._waits, []
        self.queue.append((waits, step))


class SimulatedIo:
    """Disk calls in any order."""

    def __init__(self, name: str, backend: SimulatedBackend) -> None:
        self.name = name
        self._backend = backend
        self.calls: list[tuple[list[Callable[[], None]], SimulatedEvent]] = []  # what is left of each

    def submit(self, fn: Callable[[], None]) -> SimulatedEvent:
        return self._queue(fn)

    def submit_steps(self, steps: Steps) -> SimulatedEvent:
        """Other operations may run between two of them."""
        return self._queue(*steps)

    def has_backlog(self) -> bool:
        return bool(self.calls)

    def submit_shared(self, jobs: list[Callable[[], None]]) -> AllDone:
        return AllDone([self.submit(job) for job in jobs])

    def run(self, index: int) -> None:
        (step, *left), event = self.calls.pop(index)
        try:
            failure = self._backend.take_failure(self.name)
            if failure is not None:
                raise failure
            step()
        except Exception as error:
            event.finish(error)
            return
        if left:
            self.calls.append((left, event))
        else:
            event.finish()

    def _queue(self, *steps: Callable[[], None]) -> SimulatedEvent:
        event = SimulatedEvent(self._backend)
        self.calls.append((list(steps), event))
        return event


class SimulatedBackend:
    """Memory and streams under a seed. `fail_next` makes the next operation of a stream or queue fail."""

    name = "simulated"
    pinned = False
    reads_host = False  # computing is queued
    near_node = None

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._random = random.Random(seed)
        self.on_progress: Callable[[], object] | None = None
        self.on_step: Callable[[str], object] | None = None
        self.compute = SimulatedStream("compute", self)
        self.promote = SimulatedStream("promote", self)
        self.demote = SimulatedStream("demote", self)
        self.read_io, self.write_io = SimulatedIo("read", self), SimulatedIo("write", self)
        self._failures: dict[str, deque[BaseException]] = {}

    def alloc_device(self, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        return aligned_rows(rows, row_bytes)

    def alloc_host(self, rows: int, row_bytes: int, *, huge_pages: str = "auto") -> npt.NDArray[np.uint8]:
        return aligned_rows(rows, row_bytes, huge_pages=huge_pages)

    def run_one(self) -> bool:
        """Run one step of one operation that may run. False when nothing may."""
        streams = [s for s in (self.compute, self.promote, self.demote) if s.is_ready()]
        choices = len(streams) + len(self.read_io.calls) + len(self.write_io.calls)
        if not choices:
            return False
        pick = self._random.randrange(choices)
        if pick < len(streams):
            self._tell(streams[pick].name)
            streams[pick].step()
            return True
        pick -= len(streams)
        io = self.read_io if pick < len(self.read_io.calls) else self.write_io
        self._tell(io.name)
        io.run(pick if io is self.read_io else pick - len(self.read_io.calls))
        return True

    def pin(self, rows: Rows) -> bool:
        return False

    def unpin(self, rows: Rows) -> None:
        pass

    def wait_any(self, timeout_s: float) -> None:
        self.run_one()

    def notify(self) -> None:
        """Nothing happens elsewhere."""

    def fail_next(self, name: str, error: BaseException) -> None:
        self._failures.setdefault(name, deque()).append(error)

    def take_failure(self, name: str) -> BaseException | None:
        waiting = self._failures.get(name)
        return waiting.popleft() if waiting else None

    def close(self, timeout_s: float) -> None:
        while self.run_one():
            pass

    def _tell(self, name: str) -> None:
        if self.on_step is not None:
            self.on_step(name)
