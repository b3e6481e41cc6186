"""Streams, events and I/O queues: the small interface behind which every copy happens.

A copy is submitted, runs later, and is done when its event says so; nobody may look at the target before. The CUDA
backend maps this to CUDA streams, the CPU backend to worker threads, the simulated one to a seeded scheduler that
poisons targets and picks any operation that may run, so that a forgotten wait shows as wrong bytes on any laptop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Rows = Any  # uint8 [rows, row_bytes]: numpy (host, CPU device) or a torch CUDA tensor (device)


class Event(Protocol):
    """Done when everything submitted to its stream before it is done."""

    error: BaseException | None  # set when the work failed; then the target's bytes mean nothing

    def is_done(self) -> bool: ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block the host. True when done."""


class Stream(Protocol):
    """Work in submission order."""

    name: str

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        """target[target_rows[i]] <- source[source_rows[i]], one submission for many rows. Rows may be column slices."""

    def run(self, fn: Callable[[], None]) -> None:
        """Host work in stream order; stands for a kernel where there is no GPU."""

    def wait(self, event: Event) -> None:
        """Later work on this stream starts after the event."""

    def record(self) -> Event: ...

    def synchronize(self, timeout_s: float | None = None) -> bool: ...


class IoQueue(Protocol):
    """Blocking calls (disk) run elsewhere."""

    def submit(self, fn: Callable[[], None]) -> Event: ...


class Backend(Protocol):
    """Memory and streams of one kind of machine."""

    name: str
    pinned: bool
    compute: Stream
    promote: Stream  # to the device
    demote: Stream  # from the device
    read_io: IoQueue
    write_io: IoQueue
    on_progress: Callable[[], object] | None  # called from workers after each completion; must be cheap

    def alloc_device(self, rows: int, row_bytes: int) -> Rows: ...

    def alloc_host(self, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]: ...

    def wait_any(self, timeout_s: float) -> None:
        """Park until something may have completed since the caller last looked."""

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


def copy_rows_now(target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
    """Copy rows on the host; runs of neighbours in both become one copy. Releases the GIL per run."""
    if not len(target_rows):
        return
    t, s = np.asarray(target_rows), np.asarray(source_rows)
    breaks = np.flatnonzero((np.diff(t) != 1) | (np.diff(s) != 1)) + 1
    starts = np.concatenate([[0], breaks]).tolist()
    ends = np.concatenate([breaks, [len(t)]]).tolist()
    for a, b in zip(starts, ends, strict=True):
        np.copyto(target[t[a] : t[a] + b - a], source[s[a] : s[a] + b - a])


def aligned_rows(rows: int, row_bytes: int, alignment: int = 4096) -> npt.NDArray[np.uint8]:
    """Zeroed host rows of exactly that size whose first byte is page aligned."""
    size = rows * row_bytes
    raw = np.zeros(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].reshape(rows, row_bytes)
