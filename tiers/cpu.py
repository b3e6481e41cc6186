"""CPU backend: one worker thread per copy stream, thread pools for disk; computing happens in the caller's own thread.

A worker never dies of the work it is given: what that raises becomes the event's error. For tests, `poison=True` fills
a target before its copy and `delay_s` makes every copy late.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .errors import TierUnavailableError
from .memory import aligned_rows
from .staged import StagedWorkers
from .streams import DONE, POISON, Event, IntArray, Progress, Rows, Work, copy_rows_now
from .workers import HostEvent as HostEvent
from .workers import SharedJobs as SharedJobs
from .workers import Workers as Workers

# Requests in flight on the disk, each way; threads that wait cost no core. Eight fill a disk when nothing is done between
# two requests; ours are checked in between.
IO_DEPTH = 12
# From here on two threads copy: one reaches half of the memory's rate with 2 MiB pieces. A stream's chunk is smaller: beside
# it somebody computes, and needs the other core more.
SHARED_COPY_BYTES = 12 << 20
_LOOK_S = 0.2  # how often a worker that waits for another looks whether it should end


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

    def run(self, fn: Work) -> None:
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

    def run(self, fn: Work) -> None:
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
        self.read_io = StagedWorkers("read", io_depth, notify)
        self.write_io = StagedWorkers("write", io_depth, notify)

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
