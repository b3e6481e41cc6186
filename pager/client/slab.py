"""LeasedSlab: the host tier of a client, made of slots of the daemon's memory.

A slot of ours is a number; while it holds a block it stands for a row of the slab that the daemon leased to us (to read) or
reserved for us (to write, before COMMIT). Guards rule 11 (a row counts as what was leased only while its generation says
so) and rule 9: what an answer of an earlier attachment lends or commits changes nothing.

Books are changed under the pager's lock, except `lend` and `add_spare`, which workers call when answers come.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ...tiers.streams import IntArray, Rows
from ..states import NOWHERE

SPARE_SHARE = 4  # of the slots that we may have, a quarter may wait to be written to, and one serves streams


class LeasedSlab:
    """One layer group's slots, within what one client may lease."""

    nodes: IntArray | None = None  # which rows we get is the daemon's choice
    node_rates: tuple[float, ...] = ()

    def __init__(self, lease_limit: int) -> None:
        self.spare_limit = max(1, lease_limit // SPARE_SHARE)
        self.stream_limit = max(1, lease_limit // SPARE_SHARE)
        self.num_slots = max(1, lease_limit - self.spare_limit - self.stream_limit)
        self.rows: Rows = np.empty((0, 0), np.uint8)
        self.is_asking = False
        self._has_answer = False  # to what was asked; the asking ends when the pager looks
        self.is_pinned = False  # the rows are page-locked for our device
        self.epoch = 0  # of the attachment whose memory this is; 0: of none
        self._ask: Callable[[int], None] = lambda count: None
        self._lock = threading.Lock()  # of everything that workers touch too
        self._row = np.full(self.num_slots, NOWHERE, np.int64)
        self._generation = np.zeros(self.num_slots, np.uint64)
        self._is_reserved = np.zeros(self.num_slots, bool)
        self._generations: npt.NDArray[np.uint64] = np.empty(0, np.uint64)  # the daemon's, shared
        self._spare: deque[tuple[int, int]] = deque()  # reserved rows without a slot, and their generations
        self._to_release: deque[int] = deque()

    def ask_with(self, group: int, ask: Callable[[int, int], None]) -> None:
        """Who to ask for slots to write to: `ask(group, count)` starts a request and ends with `add_spare`."""
        self._ask = lambda count: ask(group, count)

    def attach(self, rows: Rows, generations: npt.NDArray[np.uint64], epoch: int) -> None:
        """Another daemon's memory; no slot of ours holds anything and no copy runs."""
        with self._lock:
            self.rows, self._generations = rows, generations
            self._begin(epoch)

    def leave(self) -> None:
        """The daemon may give every row to others from now on: nothing is written to, or given back, until `attach`."""
        with self._lock:
            self._begin(0)

    def _begin(self, epoch: int) -> None:
        """Of that epoch no slot has a row yet."""
        self.epoch = epoch
        self._row[:] = NOWHERE
        self._is_reserved[:] = False
        self._spare.clear()
        self._to_release.clear()

    # ------------------------------------------------------------------ as a slab
    def place(self, slots: IntArray) -> IntArray:
        placed: IntArray = self._row[slots]
        return placed

    def settle(self) -> None:
        """Under the pager's lock: an answer that came is seen from here on, not in the middle of somebody's look."""
        if self._has_answer:
            self._has_answer = self.is_asking = False

    def room_to_write(self, wanted: int) -> int:
        self.settle()
        short = min(wanted, self.spare_limit) - len(self._spare)
        if short > 0 and not self.is_asking:
            self.is_asking = True
            self._ask(short)
        return min(wanted, len(self._spare))

    def begin_write(self, slots: IntArray) -> None:
        with self._lock:
            for slot in slots.tolist():
                self._row[slot], self._generation[slot] = self._spare.popleft()
            self._is_reserved[slots] = True

    def let_go(self, slots: IntArray) -> None:
        with self._lock:
            placed = slots[self._row[slots] >= 0]
            reserved = placed[self._is_reserved[placed]]
            self._spare.extend(zip(self._row[reserved].tolist(), self._generation[reserved].tolist(), strict=True))
            self._to_release.extend(self._row[placed[~self._is_reserved[placed]]].tolist())
            self._row[placed] = NOWHERE
            self._is_reserved[placed] = False

    def intact(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        rows = self._row[slots]
        return (rows >= 0) & (self._generations[np.maximum(rows, 0)] == self._generation[slots])

    def is_reserved(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Whether the rows of these slots are ours to write; else they are leased to us to be read."""
        reserved: npt.NDArray[np.bool_] = self._is_reserved[slots]
        return reserved

    # ------------------------------------------------------------------ answers of the daemon
    def lend(self, epoch: int, slots: IntArray, rows: IntArray, generations: npt.NDArray[np.uint64]) -> bool:
        """These rows are leased to us for these slots. False when that was another daemon's memory."""
        with self._lock:
            if epoch != self.epoch:
                return False
            self._row[slots], self._generation[slots] = rows, generations
            self._is_reserved[slots] = False
            return True

    def committed(self, epoch: int, slots: IntArray, generations: npt.NDArray[np.uint64]) -> None:
        """The rows of these slots are leases now, and no longer ours to write."""
        with self._lock:
            if epoch == self.epoch:
                self._is_reserved[slots] = False
                self._generation[slots] = generations

    def add_spare(self, epoch: int, rows: IntArray, generations: npt.NDArray[np.uint64]) -> None:
        """Rows that we may write to; none when the daemon had no room. The asking is over."""
        with self._lock:
            if epoch == self.epoch:
                self._spare.extend(zip(rows.tolist(), generations.tolist(), strict=True))
            self._has_answer = True

    def take_releases(self) -> IntArray:
        """Rows that we need no longer, once each."""
        with self._lock:
            rows = np.array(self._to_release, np.int64)
            self._to_release.clear()
            return rows

    def take_surplus(self, keep: int) -> IntArray:
        """Spare rows beyond `keep`, to be given back."""
        with self._lock:
            surplus = [self._spare.pop()[0] for _ in range(max(0, len(self._spare) - keep))]
            return np.array(surplus, np.int64)
