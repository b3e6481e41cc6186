"""Least frequently used, by requests since the block came; the older one of two alike leaves first.

Source: the counting rule of Aho, Denning, Ullman, "Principles of optimal page replacement" (JACM 18(1), 1971). Nothing
fades: it is here to show why that matters. Counts stop at 63.
"""

from __future__ import annotations

import numpy as np

from .base import _FIRST_SIZE, IntArray, resized
from .queues import QueuePolicy

_MOST_USES = 63


class Lfu(QueuePolicy):
    name = "lfu"
    num_queues = _MOST_USES

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses = np.zeros(_FIRST_SIZE, np.int64)

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        if num_ids > len(self._uses):
            self._uses = resized(self._uses, len(self.depth), 0)

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self._uses[blocks] = 1
        self.queues.push(1, blocks[::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self._uses[blocks] = uses = np.minimum(self._uses[blocks] + 1, _MOST_USES)
        for number in np.unique(uses).tolist():
            self.queues.push(number, blocks[uses == number][::-1])
