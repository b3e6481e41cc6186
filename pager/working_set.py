"""What the sequences that run in turns read next: their working set (Denning, 1968), of one layer group.

An engine lets in as many sequences as the device tier holds together, and then fills it to the last page. Which page
leaves must then not be left to a policy alone: it ranks by what was used when, and with a few pages to spare it gives up
the end of one running sequence to bring up that of another, in turns, for ever.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..tiers.layout import KVLayout
from .page_table import Sequence, seen_blocks
from .states import IntArray


class WorkingSet:
    """Of one layer group. Looked up only where something has to leave, so a step that moves nothing pays nothing."""

    def __init__(self, layout: KVLayout, index: int) -> None:
        self._layout, self._index = layout, index
        self.sequences: tuple[Sequence, ...] = ()  # in turns on the device tier; one that has ended reads nothing

    def holds(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Which of these blocks some of the sequences reads next. Cost: of the blocks that they all read."""
        if not self.sequences or not len(blocks):
            return np.zeros(len(blocks), bool)
        return np.isin(blocks, np.concatenate([self._read_by(seq) for seq in self.sequences]))

    def _read_by(self, seq: Sequence) -> IntArray:
        table = seq.tables[self._index].ids
        if self._layout.window is None:
            return table
        seen = seen_blocks(self._layout, table, seq.num_computed, seq.num_computed)
        return table[seen[seen < len(table)]]
