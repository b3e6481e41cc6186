"""Streams, events and I/O queues: the small interface behind which every copy happens.

A copy is submitted, runs later, and is done when its event says so; nobody may look at the target before. The CUDA
backend maps this to CUDA streams, the CPU backend to worker threads, the simulated one to a seeded scheduler that
poisons targets and picks any operation that may run, so that a forgotten wait shows as wrong bytes on any laptop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .memory import aligned_rows as aligned_rows
from .runs import IntArray, plan_runs

Steps = tuple[Callable[[], None], Callable[[], None], Callable[[], None]]  # before a disk call, the call, after it
Verdict = Callable[[], BaseException | None]  # what became of work on a device, asked once it is done
Work = Callable[[], Verdict | None]
Rows = Any  # uint8 [rows, row_bytes]: numpy (host, CPU device) or a torch CUDA tensor (device)


class Event(Protocol):
    """Done when everything submitted to its stream before it is done."""

    @property
    def error(self) -> BaseException | None:
        """Set when the work failed; then the target's bytes mean nothing."""

    def is_done(self) -> bool: ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block the host. True when done."""


class Stream(Protocol):
    """Work in submission order."""

    @property
    def name(self) -> str: ...

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        """target[target_rows[i]] <- source[source_rows[i]], one submission for many rows. Rows may be column slices."""

    def run(self, fn: Work) -> None:
        """Host work in stream order; stands for a kernel where there is no GPU.

        What only a device can tell is a verdict: it is asked when the event recorded next is done, and is its error.
        """

    def wait(self, event: Event) -> None:
        """Later work on this stream starts after the event."""

    def record(self) -> Event: ...

    def synchronize(self, timeout_s: float | None = None) -> bool: ...


class IoQueue(Protocol):
    """Blocking calls (disk) run elsewhere."""

    def submit(self, fn: Callable[[], None]) -> Event: ...

    def has_backlog(self) -> bool:
        """Whether calls wait for a worker."""

    def submit_shared(self, jobs: list[Callable[[], None]]) -> Event:
        """Jobs, at least one, that belong together; who waits for them may be made to do some of them."""

    def submit_steps(self, steps: Steps) -> Event:
        """A call with computing before and after it, in turn, perhaps by several threads; what one raises ends them."""


class Backend(Protocol):
    """Memory and streams of one kind of machine."""

    on_progress: Callable[[], object] | None  # called from workers after each completion; must be cheap

    @property
    def name(self) -> str: ...

    @property
    def pinned(self) -> bool: ...

    @property
    def reads_host(self) -> bool:
        """Whether computing is the caller's own, and host memory as near to it as the device's: nothing need be copied."""

    @property
    def compute(self) -> Stream: ...

    @property
    def promote(self) -> Stream:
        """Copies to the device."""

    @property
    def demote(self) -> Stream:
        """Copies from the device."""

    @property
    def read_io(self) -> IoQueue: ...

    @property
    def write_io(self) -> IoQueue: ...

    def alloc_device(self, rows: int, row_bytes: int) -> Rows: ...

    @property
    def near_node(self) -> int | None:
        """The NUMA node that the device hangs on, where there is one and the machine says so."""

    def alloc_host(self, rows: int, row_bytes: int, *, huge_pages: str = "auto") -> npt.NDArray[np.uint8]:
        """Zeroed host memory; pinned and faulted in where `pinned`, else fresh. `huge_pages` as in memory.py; a hint
        where the driver chooses the pages."""

    def pin(self, rows: Rows) -> bool:
        """Page-lock host rows that somebody else made, so that copies need no detour; False where that cannot be."""

    def unpin(self, rows: Rows) -> None:
        """Before they are unmapped, and after the last copy. For rows that `pin` took."""

    def wait_any(self, timeout_s: float) -> None:
        """Park until something may have completed since the caller last looked."""

    def notify(self) -> None:
        """Something has completed elsewhere that somebody here may wait for."""

    def close(self, timeout_s: float) -> None: ...


class DoneEvent:
    """An event of work that is over."""

    error: BaseException | None = None

    def is_done(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        return True


DONE = DoneEvent()
POISON = 0xA5


class AllDone:
    """Done when all of these events are; an error of any is its error."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events

    @property
    def error(self) -> BaseException | None:
        return next((event.error for event in self._events if event.error is not None), None)

    def is_done(self) -> bool:
        return all(event.is_done() for event in self._events)

    def wait(self, timeout_s: float | None = None) -> bool:
        if timeout_s is None:
            return all(event.wait() for event in self._events)
        deadline_s = time.monotonic() + timeout_s
        return all(event.wait(max(0.0, deadline_s - time.monotonic())) for event in self._events)


class ForeignCopy:
    """Event of a copy that another process makes.

    Where that process is lost nobody knows when its target is at rest, so this is not done; but nothing will be read from
    that target, so its source may be written again: `source_over` is done.
    """

    def __init__(self, over: Event, source_over: Event) -> None:
        self._over, self.source_over = over, source_over

    @property
    def error(self) -> BaseException | None:
        return self._over.error

    def is_done(self) -> bool:
        return self._over.is_done()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._over.wait(timeout_s)


class Progress:
    """Completions, counted, so that a caller who looked, then parks, never sleeps through one.

    Each thread is woken by everything that completed since its own last return from `wait_any`, also by what
    completed before it parked. At worst it looks once for nothing.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._seen = threading.local()
        self.callback: Callable[[], object] | None = None

    def notify(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()
        if self.callback is not None:
            self.callback()

    def wait_any(self, timeout_s: float) -> None:
        seen = getattr(self._seen, "count", 0)
        with self._changed:
            self._changed.wait_for(lambda: self._count != seen, timeout_s)
            self._seen.count = self._count


def copy_rows_now(target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
    """Copy rows on the host; runs of neighbours in both become one copy. Releases the GIL per run."""
    starts = (part.tolist() for part in plan_runs(target_rows, source_rows))
    for t, s, n in zip(*starts, strict=True):
        np.copyto(target[t : t + n], source[s : s + n])
