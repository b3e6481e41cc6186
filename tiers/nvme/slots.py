"""Slots of one layer group: which are free, the ring of segments that they lie in, and runs that one call can move.

Bookkeeping only. Slots are handed out from the open segment, front to back, then from the next clean one, so that blocks
written together lie together; when no segment is clean, from holes in the others, so that no put ever waits. Who calls
keeps segments clean (pager/reclaim.py). Source of the ring: FIFO regions with re-insertion, as CacheLib's block cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import TierFullError
from ..streams import IntArray
from .layout import Geometry
from .manifest import GroupListing

RUN_BYTES = 2 << 20  # of blocks, of one call to the kernel
LONG_RUN_BYTES = 8 << 20  # likewise, where all workers have something to do all the same: fewer calls cost less
MANY_RUNS = 24  # calls that keep all workers busy, each with a next one in hand
RUN_SLOTS = 256  # of one call; two buffers each, and the kernel takes 1,024
NONE_OPEN = -1


class SlotBook:
    """Free and listed slots. `listing` is the manifest's own view of the group, shared with it.

    Slots past `num_slots` may still be used, by a store that had more room once; they are never handed out again.
    """

    def __init__(self, num_slots: int, geometry: Geometry, listing: GroupListing) -> None:
        self.num_slots, self.geometry, self.listing = num_slots, geometry, listing
        size = geometry.slots_per_segment
        self.num_segments = num_slots // size  # whole ones; the ring leaves out a last one that is cut short
        taken = listing.slots()
        known = (
            int(taken.max()) // size + 1 if len(taken) else 0
        )  # those after it are clean; arrays grow when they are opened
        self._is_used = np.zeros(known * size, bool)
        self._is_used[taken] = True
        self._used = self._is_used.reshape(known, size).sum(1)  # slots of each segment
        self._age = np.zeros(known, np.int64)  # when a segment was opened; 0: clean
        self._clock = 0
        self._open, self._cursor = NONE_OPEN, 0
        self.num_used = len(taken)
        self._recover_order(taken)

    @property
    def num_free(self) -> int:
        return max(0, self.num_slots - self.num_used)

    def allocate(self, n: int, group: int, *, not_in: int = NONE_OPEN) -> IntArray:
        """n slots, none of them in segment `not_in`. Raises TierFullError and changes nothing when there are fewer."""
        holes = self._holes(not_in) if self._appendable() < n else None
        if n > self.num_free or (holes is not None and self._appendable() + len(holes) < n):
            raise TierFullError(
                f"nvme tier full: {self.num_used} of {self.num_slots} slots of group {group} used, {n} more wanted; "
                "raise nvme_bytes or forget sessions",
                retry_after_s=0.1,
            )
        parts = []
        left = n
        while left and (self._cursor < self._end(self._open) or self._open_next()):
            count = min(left, self._end(self._open) - self._cursor)
            first = self._open * self.geometry.slots_per_segment + self._cursor
            parts.append(np.arange(first, first + count, dtype=np.int64))
            self._cursor += count
            left -= count
            self._take(parts[-1])
        if left:
            assert holes is not None
            parts.append(_neighbours(holes, left))
            self._take(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def free_unlisted(self) -> None:
        """At the end of a recovery: slots of what turned out to be gone belong to nobody."""
        used = np.flatnonzero(self._is_used)
        if len(used):
            self.free(used[~self.listing.listed[used]])

    def free(self, slots: IntArray) -> None:
        self._is_used[slots] = False
        numbers = slots // self.geometry.slots_per_segment
        np.subtract.at(self._used, numbers, 1)
        empty = np.unique(numbers)
        empty = empty[self._used[empty] == 0]
        self._age[empty[empty != self._open]] = 0
        self.num_used -= len(slots)

    def footprint(self, stamps: npt.NDArray[Any]) -> int:
        """Bytes of disk under these blocks."""
        return int(self.geometry.footprint(stamps["stored_bytes"]).sum())

    # ------------------------------------------------------------------ the ring
    def num_clean(self) -> int:
        """Segments that can be opened and filled from their front."""
        known = min(len(self._age), self.num_segments)
        return self.num_segments - int(np.count_nonzero(self._age[:known]))

    def next_clean(self) -> int:
        """The segment that is filled when the open one is full; NONE_OPEN where none is clean. Its file may be missing."""
        clean = np.flatnonzero(self._age == 0)
        number = int(clean[0]) if len(clean) else len(self._age)
        return number if self._end(number) else NONE_OPEN

    def sealed(self) -> IntArray:
        """Segments that hold blocks and are not being filled, oldest first."""
        found = np.flatnonzero(self._age[: self.num_segments] > 0)
        found = found[found != self._open]
        return found[np.argsort(self._age[found], kind="stable")]

    def num_used_in(self, segments: IntArray) -> IntArray:
        return self._used[segments]

    def retain(self, segment: int) -> None:
        """Leave a segment as it is; it counts as the youngest from now on."""
        self._clock += 1
        self._age[segment] = self._clock

    # ------------------------------------------------------------------ inside
    def _recover_order(self, taken: IntArray) -> None:
        """Segments by the age of their oldest block; the youngest is filled further."""
        if not len(taken):
            return
        size = self.geometry.slots_per_segment
        oldest = np.full(len(self._age), np.iinfo(np.int64).max)
        np.minimum.at(oldest, taken // size, self.listing.stamps["generation"][taken].astype(np.int64))
        order = np.argsort(oldest, kind="stable")[: int((self._used > 0).sum())]
        self._age[order] = np.arange(1, len(order) + 1)
        self._clock, youngest = len(order), int(order[-1])
        last = int(np.flatnonzero(self._is_used[youngest * size : (youngest + 1) * size])[-1])
        self._open, self._cursor = youngest, last + 1

    def _end(self, segment: int) -> int:
        """Slots of a segment that may be used."""
        if segment == NONE_OPEN:
            return 0
        size = self.geometry.slots_per_segment
        return max(0, min(size, self.num_slots - segment * size))

    def _appendable(self) -> int:
        """Slots that lie behind the cursor and in clean segments."""
        cut = self.num_segments
        is_cut_clean = cut >= len(self._age) or self._age[cut] == 0
        behind = max(0, self._end(self._open) - self._cursor)
        return behind + self.num_clean() * self.geometry.slots_per_segment + is_cut_clean * self._end(cut)

    def _open_next(self) -> bool:
        """Go on to the first clean segment."""
        number = self.next_clean()
        if number == NONE_OPEN:
            return False
        self._reach(number + 1)
        if self._open != NONE_OPEN and self._used[self._open] == 0:
            self._age[self._open] = 0
        self._open, self._cursor = number, 0
        self.retain(number)
        return True

    def _take(self, slots: IntArray) -> None:
        self._is_used[slots] = True
        np.add.at(self._used, slots // self.geometry.slots_per_segment, 1)
        self.num_used += len(slots)
        self.listing.reach(int(slots[-1]) + 1 if len(slots) else 0)

    def _holes(self, not_in: int) -> IntArray:
        """Free slots before the cursor and in sealed segments."""
        size = self.geometry.slots_per_segment
        free = np.flatnonzero(~self._is_used[: self.num_slots])
        numbers = free // size
        is_hole = (self._age[numbers] > 0) & (numbers != not_in)
        is_hole &= (numbers != self._open) | (free - numbers * size < self._cursor)
        return free[is_hole]

    def _reach(self, segments: int) -> None:
        if segments > len(self._age):
            more = max(segments, 2 * len(self._age)) - len(self._age)
            self._age = np.concatenate([self._age, np.zeros(more, np.int64)])
            self._used = np.concatenate([self._used, np.zeros(more, self._used.dtype)])
            self._is_used = np.concatenate([self._is_used, np.zeros(more * self.geometry.slots_per_segment, bool)])


def _neighbours(slots: IntArray, n: int) -> IntArray:
    """The first n of these sorted slots that lie next to each other, else simply the first n."""
    is_run = slots[n - 1 :] - slots[: len(slots) - n + 1] == n - 1
    first = int(np.argmax(is_run)) if is_run.any() else 0
    return slots[first : first + n].astype(np.int64)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slots of one segment: which of a call's slots they are, where they start, how many."""

    start: int
    count: int
    segment: int
    offset: int

    @property
    def part(self) -> slice:
        """Where the run lies in the call's arrays."""
        return slice(self.start, self.start + self.count)


def plan_runs(geometry: Geometry, slots: IntArray) -> Iterator[Run]:
    """Cut a call's slots into runs, none larger than one call to the kernel should be."""
    nbytes = min(max(RUN_BYTES, len(slots) // MANY_RUNS * geometry.block_bytes), LONG_RUN_BYTES)
    limit = max(1, min(RUN_SLOTS, nbytes // geometry.block_bytes))
    per_segment = geometry.slots_per_segment
    at, end = 0, len(slots)
    numbers: list[int] = slots.tolist()
    while at < end:
        count = 1
        while (
            at + count < end
            and count < limit
            and numbers[at + count] == numbers[at] + count
            and numbers[at + count] % per_segment
        ):
            count += 1
        segment, offset = geometry.place(numbers[at])
        yield Run(at, count, segment, offset)
        at += count


def segments_of(geometry: Geometry, slots: IntArray) -> list[int]:
    found: npt.NDArray[np.int64] = np.unique(slots // geometry.slots_per_segment)
    return found.tolist()
