"""Reads of one store, handed to the backend's workers: blocks by runs, a few large ones in parts, layers in small jobs.

Whatever fails a check is `ok=False` in the ticket, never an exception; what proves a block is its mover's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layout import KVLayout
from ..streams import AllDone, Event, IntArray, IoQueue, Rows
from .blocks import BlockCall
from .movers import Movers
from .parts import PartedRead, num_parts
from .slots import Run, SlotBook, plan_runs

_SLICE_JOB_BYTES = 1 << 18  # slices of small blocks share a job
Stamps = npt.NDArray[Any]


class IoTicket:
    """One call under way. `ok[i]` says whether slot i is good, once `event` is done."""

    def __init__(self, n: int) -> None:
        self.ok: npt.NDArray[np.bool_] = np.zeros(n, bool)
        self.unreadable: npt.NDArray[np.bool_] = np.zeros(n, bool)  # of blocks to be moved
        self.checksums = np.zeros(n, np.uint64)
        self.event: Event = AllDone([])


class Reader:
    """Of one store. Rows must not be used before the ticket's event is done."""

    def __init__(self, queue: IoQueue, movers: Movers, books: Sequence[SlotBook], layouts: Sequence[KVLayout]) -> None:
        self._queue, self._movers, self._books, self._layouts = queue, movers, books, layouts

    def read(self, group: int, slots: IntArray, target: Rows, rows: IntArray, stamps: Stamps) -> IoTicket:
        """Read blocks into target rows."""
        ticket, mover = IoTicket(len(slots)), self._movers.of(group)
        parts = 1 if self._queue.has_backlog() else num_parts(self._layouts[group].block_bytes, len(slots))
        if parts > 1 and self._movers.reads_parts(group, target, rows):
            jobs = self._in_parts(group, slots, target, rows, stamps, ticket, parts)
            ticket.event = self._queue.submit_shared(jobs)
            return ticket

        runs = plan_runs(self._books[group].geometry, slots)
        if mover is self._movers.plain and self._movers.plain.goes_straight(group, target, rows):
            ticket.event = AllDone([self._in_steps(group, run, target, rows, stamps, ticket) for run in runs])
            return ticket

        def job(run: Run) -> None:
            ticket.ok[run.part] = mover.read(group, run, target, rows[run.part], stamps[run.part])

        ticket.event = AllDone([self._queue.submit(bound(job, run)) for run in runs])
        return ticket

    def read_layer(
        self, group: int, slots: IntArray, layer: int, target: Rows, rows: IntArray, stamps: Stamps
    ) -> IoTicket:
        """Read one layer's slice of each block. Under a codec, decodes whole blocks."""
        ticket, mover = IoTicket(len(slots)), self._movers.of(group)
        step = max(1, _SLICE_JOB_BYTES // self._layouts[group].layer_bytes)

        def job(first: int) -> None:
            for i in range(first, min(first + step, len(slots))):
                ticket.ok[i] = mover.read_slice(group, int(slots[i]), layer, target[rows[i]], stamps[i])

        firsts = range(0, len(slots), step)
        ticket.event = AllDone([self._queue.submit(bound(job, first)) for first in firsts])
        return ticket

    def _in_steps(self, group: int, run: Run, target: Rows, rows: IntArray, stamps: Stamps, ticket: IoTicket) -> Event:
        """Queue the read of one run."""
        mover, part = self._movers.plain, run.part
        prepared: BlockCall
        is_read = False

        def before() -> None:
            nonlocal prepared
            prepared = mover.before_read(group, run, target, rows[part])

        def call() -> None:
            nonlocal is_read
            is_read = mover.call_read(prepared)

        def after() -> None:
            ticket.ok[part] = mover.after_read(prepared, stamps[part], is_read=is_read)

        return self._queue.submit_steps((before, call, after))

    def _in_parts(
        self, group: int, slots: IntArray, target: Rows, rows: IntArray, stamps: Stamps, ticket: IoTicket, parts: int
    ) -> list[Callable[[], None]]:
        """What reads each of these few blocks with several workers."""

        def one(i: int) -> PartedRead:
            row = target[int(rows[i])]
            return PartedRead(
                self._movers.plain, group, int(slots[i]), row, stamps[i], parts, lambda ok: ticket.ok.__setitem__(i, ok)
            )

        return [job for i in range(len(slots)) for job in one(i).jobs]


def bound(job: Callable[[Any], None], argument: Any) -> Callable[[], None]:
    """A call of the job with this argument."""

    def call() -> None:
        job(argument)

    return call
