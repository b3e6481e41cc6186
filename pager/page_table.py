"""Page table, level one: per sequence and layer group, logical block -> block id; and which blocks a query sees.

Pure arithmetic and small arrays. NOWHERE in a table means that the group does not hold that block (it fell out of the
window). Half-open intervals of tokens throughout: a span [start, end) is what one step writes.

    tokens      0 ......... lowest visible ........ start ..... end
    blocks      [sinks]     [ context, read only  ][ tail ][ new ]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..tiers.layout import KVLayout
from .foresight import Session
from .keys import KeyChain
from .states import NOWHERE, IntArray

if TYPE_CHECKING:
    from .prefix import Match


@dataclass(frozen=True, slots=True)
class Row:
    """Where the blocks of a whole table lie in the device tier: true while the table has this version and no block has
    left the tier since."""

    version: int
    num_left: int  # of the group's pages
    ids: IntArray
    pages: IntArray
    table: npt.NDArray[np.int32]  # [1, blocks], of the same pages
    logical: IntArray  # 0, 1, 2, ...


class BlockTable:
    """A growing array of block ids."""

    def __init__(self, blocks: IntArray | None = None) -> None:
        self._ids = np.empty(16, np.int64) if blocks is None else np.array(blocks, np.int64)
        self._used = 0 if blocks is None else len(blocks)
        self.version = 0  # how often it has changed
        self.row: Row | None = None  # where its blocks were found last
        self.touched_s = float("-inf")  # when a step that was filled in place last told that its blocks are in use

    def __len__(self) -> int:
        return self._used

    @property
    def ids(self) -> IntArray:
        """A view; what changes the table are its methods."""
        view = self._ids[: self._used]
        view.flags.writeable = False
        return view

    def known_row(self, num_left: int) -> Row | None:
        """Where its blocks lie, if that is remembered and still true; `num_left` is that of the group's pages now."""
        row = self.row
        return row if row is not None and row.version == self.version and row.num_left == num_left else None

    def put(self, index: IntArray | int, blocks: IntArray | int) -> None:
        """Other blocks in these places."""
        self._ids[: self._used][index] = blocks
        self.version += 1

    def extend(self, blocks: IntArray) -> None:
        need = self._used + len(blocks)
        if need > len(self._ids):
            grown = np.empty(max(need, 2 * len(self._ids), 16), np.int64)
            grown[: self._used] = self.ids
            self._ids = grown
        self._ids[self._used : need] = blocks
        self._used = need
        self.version += 1

    def trim(self, num_blocks: int) -> IntArray:
        """Cut the table to num_blocks; returns the ids cut off (without NOWHERE)."""
        cut = self._ids[num_blocks : self._used].copy()
        self._used = min(self._used, num_blocks)
        self.version += 1
        return cut[cut >= 0]

    def copy(self) -> BlockTable:
        return BlockTable(self.ids)


@dataclass(slots=True)
class Sequence:
    """Tokens, how many of them have their K/V stored, and one block table per layer group."""

    id: int
    namespace: str
    chain: KeyChain
    tables: list[BlockTable]
    token_ids: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of full blocks of token_ids, as far as asked for
    num_computed: int = 0
    num_leases: int = 0
    session_id: str | None = None
    resumed: Match | None = None  # where its tokens were when it was resumed, until its first turn counts them
    foreseen: Session | None = None  # what foresight remembers of the session whose turn this is
    branch: tuple[int, str] | None = None  # from this token on K/V are approximate; see Pager.branch

    def branch_at(self, num_tokens: int, name: str) -> None:
        """Name the blocks that hold tokens from here on apart."""
        self.branch, self.chain = (num_tokens, name), self.chain.branched(num_tokens, name)
        del self.keys[num_tokens // self.chain.block_size :]


def num_blocks_of(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def lowest_visible(layout: KVLayout, position: int) -> int:
    """First token that a query at `position` sees by its window (sinks aside)."""
    return 0 if layout.window is None else max(0, position - layout.window + 1)


def lowest_needed(layout: KVLayout, position: int) -> int:
    """First token that has to be there for it; a tail's whole blocks need not be."""
    return position if layout.is_tail else lowest_visible(layout, position)


def seen_blocks(layout: KVLayout, table: IntArray, start: int, end: int) -> IntArray:
    """As `visible_blocks`, of a sequence with that table: of a tail only the newest ones that it holds without a gap."""
    logical = visible_blocks(layout, start, end)
    if not layout.is_tail:
        return logical
    old = logical[logical < min(start // layout.block_size, len(table))]
    gaps = np.flatnonzero(table[old] == NOWHERE)
    return logical[int(gaps[-1]) + 1 :] if len(gaps) else logical


def visible_blocks(layout: KVLayout, start: int, end: int) -> IntArray:
    """Logical blocks that queries at [start, end) read or write, ascending: sinks, then the window, then the span.

    Up to `start` itself: those of them that exist before the span is written.
    """
    size = layout.block_size
    first = lowest_visible(layout, start) // size
    num_sink_blocks = min(num_blocks_of(layout.sinks, size), first)
    if not num_sink_blocks:
        return np.arange(first, num_blocks_of(end, size))
    return np.concatenate([np.arange(num_sink_blocks), np.arange(first, num_blocks_of(end, size))])


def dropped_from_window(layout: KVLayout, table: IntArray, next_position: int) -> IntArray:
    """Logical blocks that no later query of this sequence can see, and that the table still holds."""
    if layout.window is None:
        return np.empty(0, np.int64)
    size = layout.block_size
    first = lowest_visible(layout, next_position) // size
    dead = np.arange(num_blocks_of(layout.sinks, size), min(first, len(table)))
    return dead[table[dead] != NOWHERE] if len(dead) else dead
