"""States of pages and host slots: the tables of legal steps and of what each use of a page waits for, and array code on
them.

Pure bookkeeping: no bytes, no clock, no streams. `Pages` guards rules 5 and 6 (nothing with a copy in flight or a pin
becomes FREE), `HostSlots` guards rule 7 (a slot is VALID only by way of STAGING, and never dropped while it is held).
The pager and the model checker (tests/model) read the same tables, so what is proven of them is true of the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from ..tiers.errors import InvariantError
from .node_links import NodeLinks
from .rules import Rule

IntArray = npt.NDArray[np.int64]
NOWHERE = -1
SEVERAL = -1  # namespaces whose bytes may be in one slot; no tag is negative


# numpy compares an array with an IntEnum element by element in int64, with a uint8 fifteen times as fast; and it looks for
# __array_ufunc__ each time, which an Enum that has none is slow to deny
class PageState(np.uint8, Enum):
    __array_ufunc__ = np.ndarray.__array_ufunc__
    FREE = 0
    FILLING = 1  # a copy-in is on its way
    RESIDENT = 2  # valid, and a lower tier holds the same bytes
    DIRTY = 3  # valid, and no lower tier holds these bytes
    WRITING_BACK = 4  # valid, a copy-out is on its way
    EVICTING = 5  # leaving; embedded this is one atomic step


class SlotState(np.uint8, Enum):
    __array_ufunc__ = np.ndarray.__array_ufunc__
    NONE = 0
    STAGING = 1
    VALID = 2
    LINKED = 3  # the rest of a block that another slot begins


PAGE_STEPS: dict[PageState, frozenset[PageState]] = {
    PageState.FREE: frozenset({PageState.FILLING, PageState.DIRTY}),  # DIRTY: the engine writes new tokens
    PageState.FILLING: frozenset({PageState.RESIDENT, PageState.FREE}),  # FREE: the copy-in failed (rule 8)
    PageState.RESIDENT: frozenset({PageState.DIRTY, PageState.EVICTING}),  # DIRTY: appended, or the copy below left
    PageState.DIRTY: frozenset({PageState.WRITING_BACK, PageState.FREE}),  # FREE: its last owner dropped it
    PageState.WRITING_BACK: frozenset({PageState.RESIDENT, PageState.DIRTY}),  # DIRTY: written meanwhile (rule 4)
    PageState.EVICTING: frozenset({PageState.FREE}),
}
SLOT_STEPS: dict[SlotState, frozenset[SlotState]] = {
    SlotState.NONE: frozenset({SlotState.STAGING, SlotState.LINKED}),
    SlotState.STAGING: frozenset({SlotState.VALID, SlotState.NONE}),
    SlotState.VALID: frozenset({SlotState.NONE}),
    SlotState.LINKED: frozenset({SlotState.NONE}),
}

NEEDS_IDLE = frozenset({PageState.FREE, PageState.EVICTING})  # no pin, no copy in flight: rules 5 and 6
NEEDS_NO_HOLD = frozenset({SlotState.NONE})  # rule 7
APPENDED: dict[PageState, PageState] = {  # what a page becomes when the engine writes more tokens into it
    PageState.RESIDENT: PageState.DIRTY,
    PageState.DIRTY: PageState.DIRTY,
    PageState.WRITING_BACK: PageState.WRITING_BACK,  # its copy-out ends as changed (rule 4)
}


@dataclass(frozen=True, slots=True)
class PageUse:
    """Work on a page that has to wait for events of that page (columns of `Pages`), and the rule that says so."""

    waits_for: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True, slots=True)
class PageCopy(PageUse):
    """A copy: the states that it takes a page through. `changed`: the block was written after the copy began."""

    begins: PageState
    ends: PageState
    changed: PageState
    fails: PageState


COPY_IN = PageCopy(
    ("last_read", "last_write"),
    Rule.COPY_IN_WAITS_READERS,
    begins=PageState.FILLING,
    ends=PageState.RESIDENT,
    changed=PageState.RESIDENT,  # nobody writes to a page that is not readable yet
    fails=PageState.FREE,
)
COPY_OUT = PageCopy(
    ("last_write",),
    Rule.COPY_OUT_WAITS_WRITER,
    begins=PageState.WRITING_BACK,
    ends=PageState.RESIDENT,
    changed=PageState.DIRTY,
    fails=PageState.DIRTY,
)
APPEND = PageUse(("copy_out",), Rule.WRITTEN_DURING_COPY_OUT_IS_DIRTY)


def page_may_step(source: PageState, to: PageState, *, is_idle: bool) -> bool:
    """Whether a page may go from one state to another; idle is who has no pin and no copy in flight."""
    return to in PAGE_STEPS[source] and (is_idle or to not in NEEDS_IDLE)


def slot_may_step(source: SlotState, to: SlotState, *, is_held: bool) -> bool:
    return to in SLOT_STEPS[source] and not (is_held and to in NEEDS_NO_HOLD)


_LEGAL_PAGE = np.zeros((2, len(PageState), len(PageState)), bool)  # is idle, source, target
for _idle, _source, _to in product((False, True), PageState, PageState):
    _LEGAL_PAGE[int(_idle), _source, _to] = page_may_step(_source, _to, is_idle=_idle)
_LEGAL_SLOT = np.zeros((2, len(SlotState), len(SlotState)), bool)  # is held, source, target
for _held, _from, _into in product((False, True), SlotState, SlotState):
    _LEGAL_SLOT[int(_held), _from, _into] = slot_may_step(_from, _into, is_held=_held)
READABLE = np.zeros(len(PageState), bool)
READABLE[[PageState.RESIDENT, PageState.DIRTY, PageState.WRITING_BACK]] = True
PAGE_MOVES = np.zeros(len(PageState), bool)  # a copy of the page is on its way
PAGE_MOVES[[PageState.FILLING, PageState.WRITING_BACK, PageState.EVICTING]] = True


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
        self.num_left = 0  # blocks that have left their page: while it stands still, what is resident stays resident
        self.peak_used = 0

    def __len__(self) -> int:
        return len(self.state)

    def step(self, pages: IntArray, to: PageState) -> None:
        """Move pages to a state. Raises InvariantError on an illegal step; the first bad page is named."""
        if not len(pages):
            return
        is_idle = (self.copies[pages] == 0) & (self.pins[pages] == 0)
        legal = _LEGAL_PAGE[is_idle.astype(np.int8), self.state[pages], to]
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
            self.num_left += len(pages)
        self.peak_used = max(self.peak_used, len(self) - self.num_free)

    def take_free(self, n: int) -> IntArray:
        """The n lowest free pages; neighbours where possible, so that views of neighbouring pages stay long."""
        return np.flatnonzero(self.state == PageState.FREE)[:n]

    def readable(self, pages: IntArray) -> npt.NDArray[np.bool_]:
        return (pages >= 0) & READABLE[self.state[np.maximum(pages, 0)]]

    def idle(self) -> npt.NDArray[np.bool_]:
        return (self.pins == 0) & (self.copies == 0)

    def note_event(self, column: npt.NDArray[Any], pages: IntArray, event: Any) -> None:
        """Remember the event that later copies must wait for. A finished one needs no remembering: those before it, of the
        same stream, are finished too."""
        if not event.is_done():
            column[pages] = event

    def awaited(self, use: PageUse, pages: IntArray) -> list[Any]:
        """The unfinished events that this use of these pages has to wait for."""
        return [event for name in use.waits_for for event in self.pending(getattr(self, name), pages)]

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
        self.writer = np.zeros(num_slots, np.int64)  # tag of the namespace whose bytes may be in a slot, or SEVERAL
        self.num_free = num_slots
        self.peak_used = 0
        self.on_drop: Callable[[IntArray], None] = lambda slots: None
        self.links: NodeLinks | None = None  # where slots lie on several nodes

    def __len__(self) -> int:
        return len(self.state)

    def take_free(self, n: int) -> IntArray:
        """n free slots: those that are written soonest where they lie on several nodes, else the lowest."""
        free = np.flatnonzero(self.state == SlotState.NONE)
        return free[:n] if self.links is None else self.links.choose(free, n)

    def stage(self, slots: IntArray, blocks: IntArray) -> None:
        self._step(slots, SlotState.STAGING)
        self.block[slots] = blocks
        self.num_free -= len(slots)
        self.peak_used = max(self.peak_used, len(self) - self.num_free)

    def take_along(self, slots: IntArray, blocks: IntArray) -> None:
        """These slots hold the rest of blocks that are being staged in others."""
        self._step(slots, SlotState.LINKED)
        self.block[slots] = blocks
        self.num_free -= len(slots)
        self.peak_used = max(self.peak_used, len(self) - self.num_free)

    def publish(self, slots: IntArray) -> None:
        self._step(slots, SlotState.VALID)

    def drop(self, slots: IntArray) -> None:
        """Leave VALID or STAGING. Raises InvariantError for a held slot (rule 7)."""
        if not len(slots):
            return
        self._step(slots, SlotState.NONE)
        self.block[slots] = NOWHERE
        self.generation[slots] += np.uint64(1)
        self.num_free += len(slots)
        self.on_drop(slots)

    def _step(self, slots: IntArray, to: SlotState) -> None:
        legal = _LEGAL_SLOT[(self.holds[slots] > 0).astype(np.int8), self.state[slots], to]
        if not legal.all():
            bad = int(slots[np.flatnonzero(~legal)[0]])
            raise InvariantError(
                f"host slot {bad}: {SlotState(self.state[bad]).name} -> {to.name} while {self.holds[bad]} copies read it"
            )
        self.state[slots] = to
