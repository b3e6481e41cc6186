"""Page table, level one: per sequence and layer group, logical block -> block id; and which blocks a query sees.

Pure arithmetic and small arrays. NOWHERE in a table means that the group does not hold that block (it fell out of the
window). Half-open intervals of tokens throughout: a span [start, end) is what one step writes.

    tokens      0 ......... lowest visible ........ start ..... end
    blocks      [sinks]     [ context, read only  ][ tail ][ new ]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..tiers.layout import KVLayout
from .keys import KeyChain
from .states import NOWHERE, IntArray


class BlockTable:
    """A growing array of block ids."""

    def __init__(self, blocks: IntArray | None = None) -> None:
        self._ids = np.empty(16, np.int64) if blocks is None else np.array(blocks, np.int64)
        self._used = 0 if blocks is None else len(blocks)

    def __len__(self) -> int:
        return self._used

    @property
    def ids(self) -> IntArray:
        """A view; writing to it changes the table."""
        return self._ids[: self._used]

    def extend(self, blocks: IntArray) -> None:
        need = self._used + len(blocks)
        if need > len(self._ids):
            grown = np.empty(max(need, 2 * len(self._ids), 16), np.int64)
            grown[: self._used] = self.ids
            self._ids = grown
        self._ids[self._used : need] = blocks
        self._used = need

    def trim(self, num_blocks: int) -> IntArray:
        """Cut the table to num_blocks; returns the ids cut off (without NOWHERE)."""
        cut = self._ids[num_blocks : self._used].copy()
        self._used = min(self._used, num_blocks)
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


def num_blocks_of(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def lowest_visible(layout: KVLayout, position: int) -> int:
    """First token that a query at `position` sees by its window (sinks aside)."""
    return 0 if layout.window is None else max(0, position - layout.window + 1)


def visible_blocks(layout: KVLayout, start: int, end: int) -> IntArray:
    """Logical blocks that queries at [start, end) read or write, ascending: sinks, then the window, then the span."""
    size = layout.block_size
    first = lowest_visible(layout, start) // size
    num_sink_blocks = min(num_blocks_of(layout.sinks, size), first) if layout.window is not None else 0
    return np.concatenate([np.arange(num_sink_blocks), np.arange(first, num_blocks_of(end, size))])


def needed_pages(layout: KVLayout, context_tokens: int, span_tokens: int) -> int:
    """Pages of this group that a span behind that context takes at most."""
    visible = context_tokens if layout.window is None else min(context_tokens, layout.window + layout.sinks)
    return num_blocks_of(visible, layout.block_size) + num_blocks_of(span_tokens, layout.block_size) + 2


def dropped_from_window(layout: KVLayout, table: IntArray, next_position: int) -> IntArray:
    """Logical blocks that no later query of this sequence can see, and that the table still holds."""
    if layout.window is None:
        return np.empty(0, np.int64)
    size = layout.block_size
    first = lowest_visible(layout, next_position) // size
    dead = np.arange(num_blocks_of(layout.sinks, size), min(first, len(table)))
    return dead[table[dead] != NOWHERE] if len(dead) else dead
