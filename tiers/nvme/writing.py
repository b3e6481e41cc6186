"""Writes of one store, handed to the backend's workers: blocks by runs, listed once all bytes of their call are down, and
moves to other slots.

Guards: a ticket's `ok` says listed, whatever a step of the call raised; what was begun is remembered until it is over, so
that nobody lets go of the store while bytes are still on their way into it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import QueueFullError, TierUnavailableError
from ..streams import AllDone, Event, IntArray, IoQueue, Rows
from .blocks import BlockCall
from .commit import Durability
from .durable import DurableListing
from .files import SegmentFiles
from .movers import Movers
from .reading import IoTicket, bound
from .slots import NONE_OPEN, Run, SlotBook, plan_runs

Stamps = npt.NDArray[Any]


class Writer:
    """`told` hears of bytes that are listed and not durable yet."""

    def __init__(
        self,
        queue: IoQueue,
        files: SegmentFiles,
        movers: Movers,
        books: Sequence[SlotBook],
        listing: DurableListing,
        durability: Durability,
        told: Callable[[int], None],
    ) -> None:
        self._queue, self._files, self._movers, self._books, self._listing = queue, files, movers, books, listing
        self._durability, self._told = durability, told
        self._lock = listing.lock  # of the books too
        self._generation = 1 + max((int(b.listing.stamps["generation"].max(initial=0)) for b in books), default=0)
        self._relocating, self._noting = threading.Lock(), threading.Lock()
        self._begun: deque[Event] = deque()  # in order of submission; over ones are let go from the front
        self._prepared = [NONE_OPEN] * len(books)  # the segment whose file was last asked for ahead of its use
        self.moved_bytes = 0

    def write(self, group: int, slots: IntArray, source: Rows, source_rows: IntArray, stamps: Stamps) -> IoTicket:
        """Write blocks; each is listed once all of this call's bytes are down. Source rows must not change meanwhile."""
        ticket, stamps = IoTicket(len(slots)), stamps.copy()
        self._number(stamps)
        runs = list(plan_runs(self._books[group].geometry, slots))
        whole, left = np.zeros(len(slots), bool), [len(runs)]

        def wrote(run: Run, is_whole: bool) -> None:
            whole[run.part] = is_whole
            with self._lock:
                left[0] -= 1
                is_last = left[0] == 0
            if is_last:
                ticket.checksums[:] = stamps["checksum"]
                if self._publish(group, slots[whole], stamps[whole]):
                    ticket.ok[:] = whole

        def job(run: Run) -> None:
            is_whole = False
            try:
                is_whole = self._write_run(group, run, source, source_rows, stamps)
            finally:
                wrote(run, is_whole)

        plain = self._movers.plain
        waits_for_syncs = self._durability == "always"  # a thread that computes for others should not
        if self._movers.of(group) is plain and not waits_for_syncs and plain.goes_straight(group, source, source_rows):
            begun = (self._in_steps(group, run, source, source_rows, stamps, wrote) for run in runs)
        else:
            begun = (self._queue.submit(bound(job, run)) for run in runs)
        ticket.event = self._noted(begun)
        self._prepare_next(group)
        return ticket

    def relocate(self, group: int, slots: IntArray, targets: IntArray) -> IoTicket:
        """Copy listed blocks to other slots, durably, and list them there instead."""
        ticket, listing = IoTicket(len(slots)), self._books[group].listing
        with self._lock:
            stamps = listing.stamps[slots].copy()  # now: by the time of the job a slot may be another's

        def job() -> None:
            with self._relocating:
                self._relocate(group, slots, targets, stamps, ticket)

        ticket.event = self._noted([self._queue.submit(job)])
        return ticket

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is under way. False on timeout."""
        with self._noting:
            begun = list(self._begun)
        return AllDone(begun).wait(timeout_s)

    # ------------------------------------------------------------------ inside
    def _prepare_next(self, group: int) -> None:
        """Behind what was just queued: the file of the segment that comes next."""
        with self._lock:
            number = self._books[group].next_clean()
        if number in (NONE_OPEN, self._prepared[group]):
            return
        self._prepared[group] = number
        with contextlib.suppress(QueueFullError, TierUnavailableError):  # the put that needs it makes it
            self._noted([self._queue.submit(partial(self._files.make_ahead, (group, number)))])

    def _noted(self, begun: Iterable[Event]) -> AllDone:
        """The events of one call, remembered as they are made: the queue may refuse a later one."""
        events: list[Event] = []
        try:
            events.extend(begun)
        finally:
            with self._noting:
                while self._begun and self._begun[0].is_done():
                    self._begun.popleft()
                self._begun.extend(events)
        return AllDone(events)

    def _number(self, stamps: Stamps) -> None:
        """Give every write a generation of its own."""
        with self._lock:
            stamps["generation"] = np.arange(self._generation, self._generation + len(stamps))
            self._generation += len(stamps)

    def _write_run(self, group: int, run: Run, source: Rows, source_rows: IntArray, stamps: Stamps) -> bool:
        part, is_empty = run.part, self._is_empty(group, run.segment)
        return self._movers.of(group).write(group, run, source, source_rows[part], stamps[part], is_empty=is_empty)

    def _in_steps(
        self,
        group: int,
        run: Run,
        source: Rows,
        source_rows: IntArray,
        stamps: Stamps,
        wrote: Callable[[Run, bool], None],
    ) -> Event:
        """Queue the write of one run."""
        mover, part = self._movers.plain, run.part
        prepared: BlockCall
        is_whole = False

        def before() -> None:
            nonlocal prepared
            prepared = mover.before_write(group, run, source, source_rows[part], stamps[part])

        def call() -> None:
            nonlocal is_whole
            is_whole = mover.call_write(prepared, is_empty=self._is_empty(group, run.segment))

        def after() -> None:
            mover.after_write(prepared)
            wrote(run, is_whole)

        def guarded(step: Callable[[], None]) -> Callable[[], None]:
            def done() -> None:
                try:
                    step()
                except Exception:  # the steps behind this one are not done, and the other runs wait for this one's word
                    wrote(run, False)
                    raise

            return done

        return self._queue.submit_steps((guarded(before), guarded(call), guarded(after)))

    def _is_empty(self, group: int, segment: int) -> bool:
        """Whether nothing is listed in the segment."""
        book = self._books[group]
        with self._lock:
            return not book.listing.in_segment(segment, book.geometry.slots_per_segment).any()

    def _publish(self, group: int, slots: IntArray, stamps: Stamps) -> bool:
        """List what was written whole; under `always`, make it durable before the call counts as done. Whether it is so."""
        if not len(slots):
            return False
        try:
            self._listing.put(group, slots, stamps)
            if self._durability == "always":
                self._listing.commit()
                if not self._books[group].listing.listed[slots].all():
                    return False  # another's commit was refused, and with it what we had just written
        except (OSError, TierUnavailableError):
            return False
        self._told(self._books[group].footprint(stamps))
        return True

    def _relocate(self, group: int, slots: IntArray, targets: IntArray, stamps: Stamps, ticket: IoTicket) -> None:
        """New bytes are durable before the journal says so, and the journal before the old slots are used again."""
        book, geometry = self._books[group], self._books[group].geometry
        generations = stamps["generation"].copy()
        rows = self._movers.spare_rows(group, len(slots))
        places, good = np.arange(len(slots)), np.zeros(len(slots), bool)
        for run in plan_runs(geometry, slots):
            good[run.part] = self._movers.of(group).read(group, run, rows, places[run.part], stamps[run.part])
        ticket.unreadable = ~good
        self._number(stamps)
        for run in plan_runs(geometry, targets):
            good[run.part] &= self._write_run(group, run, rows, places, stamps)
        try:
            if self._durability != "none":
                before = self._listing.num_refused
                self._listing.wrote(group, targets)
                self._listing.commit()
                if self._listing.num_refused != before:
                    return  # of another's commit: it may have had our bytes to sync
            good[good] = self._listing.move(group, slots[good], targets[good], stamps[good], generations[good])
        except (OSError, TierUnavailableError):
            return
        if self._durability != "none":
            self._listing.commit_quietly()
        self.moved_bytes += book.footprint(stamps[good])
        ticket.ok[:] = good
