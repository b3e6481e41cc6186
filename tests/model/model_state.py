"""Values of the model of pages and host slots: what is where, what is queued, what is being moved, who reads.

A state is a tuple of tuples, so that it can be looked up. Contents are (block, version), or None for bytes that mean
nothing: a missing wait shows as a read of the wrong content. Not in the model: several engines, partial batches,
layers, quotas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvtier.pager.states import READABLE, PageState, SlotState

Content = tuple[int, int] | None  # block and version
IS_READABLE = READABLE.tolist()
UNBORN, REFERENCED, ENDED = range(3)
STREAM_OF = {
    "read": "compute",
    "write": "compute",
    "write new": "compute",
    "ring read": "compute",
    "copy in": "promote",
    "stage": "promote",
    "copy out": "demote",
    "sink": "io",
    "fetch": "io",
}


TWO_STEPS = frozenset({"copy in", "copy out", "stage", "fetch"})  # the target means nothing between them


class Violation(Exception):
    """Something that must never happen."""


class Page(NamedTuple):
    state: PageState = PageState.FREE
    block: int = -1
    pins: int = 0
    copies: int = 0
    last_read: int = -1  # ids of operations in flight, as the columns of `Pages` hold events
    last_write: int = -1
    copy_out: int = -1
    content: Content = None


class Slot(NamedTuple):
    state: SlotState = SlotState.NONE
    block: int = -1
    holds: int = 0
    content: Content = None


class Block(NamedTuple):
    life: int = UNBORN
    version: int = 0
    below: Content = None  # the copy on nvme, where there is one


class Op(NamedTuple):
    """Queued work. Copies run in two steps: the target's bytes mean nothing between them."""

    id: int
    kind: str
    page: int
    slot: int
    block: int
    version: int
    waits: frozenset[int]
    is_begun: bool = False


class Move(NamedTuple):
    """A copy that the pager has to finish; `op` is -1 once its event is done."""

    kind: str
    page: int
    slot: int
    block: int
    version: int
    op: int
    has_failed: bool = False
    result: Content = None


class Reader(NamedTuple):
    """Reads a host slot without a hold, and compares generations afterwards (rule 11)."""

    slot: int
    block: int
    version: int
    is_changed: bool = False
    has_read: bool = False
    content: Content = None


class Client(NamedTuple):
    """Another process that reads a held slot (rule 10)."""

    slot: int
    block: int
    version: int
    is_connected: bool = True


class State(NamedTuple):
    pages: tuple[Page, ...]
    slots: tuple[Slot, ...]
    blocks: tuple[Block, ...]
    ops: tuple[Op, ...] = ()
    moves: tuple[Move, ...] = ()
    late: tuple[Move, ...] = ()  # completions of an epoch that is over
    lease: tuple[int, int, bool] | None = None  # page, block, whether it writes
    reader: Reader | None = None
    client: Client | None = None
    ring: tuple[Content, int] = (None, -1)  # content of the staging row, its last reader
    failures: int = 0  # left
    abandons: int = 0  # left


@dataclass(frozen=True)
class Bound:
    """What takes part, and how much of it."""

    name: str
    pages: int = 2
    slots: int = 2
    blocks: int = 2
    versions: int = 2
    ops: int = 3
    failures: int = 0
    abandons: int = 0
    actors: frozenset[str] = field(default_factory=frozenset)  # of: sink, reader, client, ring

    def first(self) -> State:
        """Block 0 lies in the host tier, the others are not born yet."""
        slots = (Slot(SlotState.VALID, 0, 0, (0, 1)), *(Slot() for _ in range(self.slots - 1)))
        blocks = (Block(REFERENCED, 1), *(Block() for _ in range(self.blocks - 1)))
        pages = tuple(Page() for _ in range(self.pages))
        return State(pages, slots, blocks, failures=self.failures, abandons=self.abandons)
