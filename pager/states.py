"""States of pages and host slots: the only legal steps, as array code.

Pure bookkeeping: no bytes, no clock, no streams. `Pages` guards rules 5 and 6 (nothing with a copy in flight or a pin
becomes FREE), `HostSlots` guards rule 7 (a slot is VALID only by way of STAGING, and never dropped while it is held).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ..tiers.errors import InvariantError

IntArray = npt.NDArray[np.int64]
NOWHERE = -1


class PageState(IntEnum):
    FREE = 0
    FILLING = 1  # a copy-in is on its way
    RESIDENT = 2  # valid, and a lower tier holds the same bytes
    DIRTY = 3  # valid, and no lower tier holds these bytes
    WRITING_BACK = 4  # valid, a copy-out is on its way
    EVICTING = 5  # leaving; embedded this is one atomic step


class SlotState(IntEnum):
    NONE = 0
    STAGING = 1
    VALID = 2


PAGE_STEPS: dict[PageState, frozenset[PageState]] = {
    PageState.FREE: frozenset({PageState.FILLING, PageState.DIRTY}),  # DIRTY: the engine writes new tokens
    PageState.FILLING: frozenset({PageState.RESIDENT, PageState.FREE}),  # FREE: the copy-in failed (rule 8)
    PageState.RESIDENT: frozenset({PageState.DIRTY, PageState.EVICTING}),  # DIRTY: appended, or the copy below left
    PageState.DIRTY: frozenset({PageState.WRITING_BACK, PageState.FREE}),  # FREE: its last owner dropped it
    PageState.WRITING_BACK: frozenset({PageState.RESIDENT, PageState.DIRTY}),  # DIRTY: written meanwhile (rule 4)
    PageState.EVICTING: frozenset({PageState.FREE}),
}
SLOT_STEPS: dict[SlotState, frozenset[SlotState]] = {
    SlotState.NONE: frozenset({SlotState.STAGING}),
    SlotState.STAGING: frozenset({SlotState.VALID, SlotState.NONE}),
    SlotState.VALID: frozenset({SlotState.NONE}),
}

_LEGAL_PAGE = np.zeros((len(PageState), len(PageState)), bool)
for _source, _targets in PAGE_STEPS.items():
    for _target in _targets:
        _LEGAL_PAGE[_source, _target] = True
READABLE = np.zeros(len(PageState), bool)
READABLE[[PageState.RESIDENT, PageState.DIRTY, PageState.WRITING_BACK]] = True


class Pages:
    """Every page of one device pool: state, block, pins, copies in flight, and the events that order its reuse."""

    def __init__(self, num_pages: int) -> None:
        self.state = np.zeros(num_pages, np.uint8)
        self.block = np.full(num_pages, NOWHERE, np.int64)
        self.pins = np.zeros(num_pages, np.int32)
        self.copies = np.zeros(num_pages, np.int32)
        self.last_read: npt.NDArray[Any] = np.full(num_pages, None, object)
        self.last_write: npt.NDArray[Any] = np.full(num_pages, None, object)
        self.copy_out: npt.NDArray[Any] = np.full(num_pages, None, object)
        self.num_free = num_pages
        self.peak_used = 0

    def __len__(self) -> int:
        return len(self.state)

    def step(self, pages: IntArray, to: PageState) -> None:
        """Move pages to a state. Raises InvariantError on an illegal step; the first bad page is named."""
        if not len(pages):
            return
        legal = _LEGAL_PAGE[self.state[pages], to]
        if to == PageState.FREE:
            legal &= (self.copies[pages] == 0) & (self.pins[pages] == 0)  # rule 5
        if to == PageState.EVICTING:
            legal &= (self.copies[pages] == 0) & (self.pins[pages] == 0)  # rule 6
        if not legal.all():
            bad = int(pages[np.flatnonzero(~legal)[0]])
            raise InvariantError(
                f"page {bad}: {PageState(self.state[bad]).name} -> {to.name} with "
                f"{self.pins[bad]} pins and {self.copies[bad]} copies in flight"
            )
        was_free = int((self.state[pages] == PageState.FREE).sum())
        self.num_free += (len(pages) if to == PageState.FREE else 0) - was_free
        self.state[pages] = to
        if to == PageState.FREE:
            self.block[pages] = NOWHERE
        self.peak_used = max(self.peak_used, len(self) - self.num_free)

    def take_free(self, n: int) -> IntArray:
        """The n lowest free pages; neighbours where possible, so that views of neighbouring pages stay long."""
        return np.flatnonzero(self.state == PageState.FREE)[:n]

    def readable(self, pages: IntArray) -> npt.NDArray[np.bool_]:
        return (pages >= 0) & READABLE[self.state[np.maximum(pages, 0)]]

    def idle(self) -> npt.NDArray[np.bool_]:
        return (self.pins == 0) & (self.copies == 0)

    def note_event(self, column: npt.NDArray[Any], pages: IntArray, event: Any) -> None:
        """Remember the event that later copies must wait for; a finished one needs no remembering."""
        column[pages] = None if event.is_done() else event

    @staticmethod
    def pending(column: npt.NDArray[Any], pages: IntArray) -> list[Any]:
        """The distinct unfinished events of these pages."""
        found = {id(e): e for e in column[pages].tolist() if e is not None and not e.is_done()}
        return list(found.values())


class HostSlots:
    """Every slot of the host slab: state, block, holds, and the generation that lets a reader notice reuse."""

    def __init__(self, num_slots: int) -> None:
        self.state = np.zeros(num_slots, np.uint8)
        self.block = np.full(num_slots, NOWHERE, np.int64)
        self.holds = np.zeros(num_slots, np.int32)
        self.generation = np.zeros(num_slots, np.uint64)
        self.num_free = num_slots
        self.peak_used = 0
        self.on_drop: Callable[[IntArray], None] = lambda slots: None

    def __len__(self) -> int:
        return len(self.state)

    def take_free(self, n: int) -> IntArray:
        return np.flatnonzero(self.state == SlotState.NONE)[:n]

    def stage(self, slots: IntArray, blocks: IntArray) -> None:
        self._require(slots, SlotState.NONE, SlotState.STAGING)
        self.state[slots] = SlotState.STAGING
        self.block[slots] = blocks
        self.num_free -= len(slots)
        self.peak_used = max(self.peak_used, len(self) - self.num_free)

    def publish(self, slots: IntArray) -> None:
        self._require(slots, SlotState.STAGING, SlotState.VALID)
        self.state[slots] = SlotState.VALID

    def drop(self, slots: IntArray) -> None:
        """Leave VALID or STAGING. Raises InvariantError for a held slot (rule 7)."""
        if not len(slots):
            return
        held = self.holds[slots] > 0
        if held.any():
            bad = int(slots[np.flatnonzero(held)[0]])
            raise InvariantError(f"host slot {bad}: dropped while {self.holds[bad]} copies read it (rule 7)")
        if (self.state[slots] == SlotState.NONE).any():
            raise InvariantError("host slot: NONE -> NONE")
        self.state[slots] = SlotState.NONE
        self.block[slots] = NOWHERE
        self.generation[slots] += np.uint64(1)
        self.num_free += len(slots)
        self.on_drop(slots)

    def _require(self, slots: IntArray, source: SlotState, target: SlotState) -> None:
        wrong = self.state[slots] != source
        if wrong.any():
            bad = int(slots[np.flatnonzero(wrong)[0]])
            raise InvariantError(f"host slot {bad}: {SlotState(self.state[bad]).name} -> {target.name}")
