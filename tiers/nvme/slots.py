"""Slots of one layer group: which are free, which are listed, and runs of them that one call to the kernel can move.

Bookkeeping only. Slots are handed out in runs that lie next to each other where there are any, so that the blocks of a
sequence do; the lowest free run that fits is taken, else the lowest slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import TierFullError
from ..streams import IntArray
from .layout import Geometry
from .manifest import GroupListing

RUN_BYTES = 2 << 20  # of one call to the kernel
RUN_SLOTS = 256  # likewise; two buffers each, and a call takes 1,024


class SlotBook:
    """Free and listed slots. `listing` is the manifest's own view of the group, shared with it."""

    def __init__(self, num_slots: int, geometry: Geometry, listing: GroupListing) -> None:
        self.num_slots, self.geometry, self.listing = num_slots, geometry, listing
        taken = listing.slots()
        self._next = int(taken.max()) + 1 if len(taken) else 0  # slots from here on were never used
        self._is_free = np.ones(self._next, bool)  # of the slots before that; grows with them
        self._is_free[taken] = False
        self._is_free[num_slots:] = False
        self.num_used = len(taken)

    @property
    def num_free(self) -> int:
        return max(0, self.num_slots - self.num_used)

    def allocate(self, n: int, group: int) -> IntArray:
        """n slots. Raises TierFullError and changes nothing when there are fewer."""
        if n > self.num_free:
            raise TierFullError(
                f"nvme tier full: {self.num_used} of {self.num_slots} slots of group {group} used, {n} more wanted; "
                "raise nvme_bytes or forget sessions",
                retry_after_s=0.1,
            )
        slots = self._lowest(n)
        self._reach(int(slots[-1]) + 1 if n else 0)
        self._is_free[slots] = False
        self.num_used += n
        return slots

    def free(self, slots: IntArray) -> None:
        self._is_free[slots[slots < self.num_slots]] = True
        self.num_used -= len(slots)

    def _reach(self, size: int) -> None:
        """Slots before `size` count as used space from now on."""
        if size > len(self._is_free):
            self._is_free = np.concatenate([self._is_free, np.zeros(2 * size - len(self._is_free), bool)])
            self.listing.reach(size)
        if size > self._next:
            self._is_free[self._next : size] = True
            self._next = size

    def _lowest(self, n: int) -> IntArray:
        """Used space before fresh space, and there the first run of n neighbours before scattered slots."""
        used = np.flatnonzero(self._is_free[: self._next])
        if len(used) >= n > 0:
            is_run = used[n - 1 :] - used[: len(used) - n + 1] == n - 1
            first = int(np.argmax(is_run)) if is_run.any() else 0
            return used[first : first + n].astype(np.int64)
        fresh = np.arange(self._next, min(self._next + n - len(used), self.num_slots), dtype=np.int64)
        return np.concatenate([used, fresh])


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slots of one segment: which of a call's slots they are, where they start, how many."""

    start: int
    count: int
    segment: int
    offset: int


def plan_runs(geometry: Geometry, slots: IntArray) -> Iterator[Run]:
    """Cut a call's slots into runs, none larger than one call to the kernel should be."""
    limit = max(1, min(RUN_SLOTS, RUN_BYTES // geometry.stride))
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
