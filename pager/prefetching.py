"""Prefetch: bring blocks up before anyone waits, into room that nobody uses.

Takes only free pages and free host slots: it evicts nothing, so it can waste bandwidth but never memory that somebody
wants. Demand copies of a later lease queue behind at most one batch of these.
"""

from __future__ import annotations

from .core import Core
from .group import BlockGroup
from .page_table import Sequence, visible_blocks
from .states import IntArray


class Prefetcher:
    """Starts prefetch copies for sequences."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def start(self, seq: Sequence) -> int:
        """Copies started now. Blocks that go nvme -> host are promoted further by the next call or the next lease."""
        started = 0
        for group, table in zip(self._core.groups, seq.tables, strict=True):
            logical = visible_blocks(group.layout, seq.num_computed, seq.num_computed)
            blocks = table.ids[logical[logical < len(table)]]
            started += self._group(group, blocks[blocks >= 0])
        return started

    def _group(self, group: BlockGroup, blocks: IntArray) -> int:
        d, started = group.directory, 0
        below = blocks[d.page[blocks] < 0]
        ready = below[d.in_host(below)][: self._spare_pages(group)]
        for batch in group.batches(ready):
            group.promote(batch, group.pages.take_free(len(batch)), "prefetch")
            started += len(batch)
        if group.cold is None:
            return started
        cold = below[(d.host_slot[below] < 0) & d.nvme_valid[below]][: group.host.num_free // 2]
        for batch in group.batches(cold):
            group.cold.read(batch, group.host.take_free(len(batch)), "prefetch")
            started += len(batch)
        return started

    def _spare_pages(self, group: BlockGroup) -> int:
        """Free pages beyond the high watermark: the rest stays for new tokens."""
        return max(0, group.pages.num_free - max(2, int(len(group.pages) * self._core.config.high_watermark)))
