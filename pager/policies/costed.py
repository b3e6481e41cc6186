"""GreedyDual: a block's worth is its value when it was last used plus the worth of whoever left last.

What stays unused is overtaken by what comes later, so nothing is dear for ever. Values are classes; within a class worth
grows with every use, so each class is a queue, and who is worth least is at the old end of one of them.
Source: Young, "The k-server dual and loose competitiveness for paging" (Algorithmica 11, 1994).
"""

from __future__ import annotations

import numpy as np

from .base import _FIRST_SIZE, FloatArray, IntArray, resized
from .queues import QueuePolicy


class Costed(QueuePolicy):
    """`value_of_class` is what a class adds to the age; rising with its number."""

    def __init__(self, capacity: int, value_of_class: FloatArray) -> None:
        self.num_queues = len(value_of_class)
        super().__init__(capacity)
        self._value, self._age = value_of_class, 0.0
        self._worth = np.zeros(_FIRST_SIZE)

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        if num_ids > len(self._worth):
            self._worth = resized(self._worth, len(self.depth), 0)

    def put(self, blocks: IntArray, classes: IntArray) -> None:
        """These were used now and are of these classes."""
        self._worth[blocks] = self._age + self._value[classes]
        if len(classes) and (classes == classes[0]).all():
            self.queues.push(1 + int(classes[0]), blocks[::-1])
            return
        for number in np.unique(classes).tolist():
            self.queues.push(1 + number, blocks[classes == number][::-1])

    def on_release(self, blocks: IntArray) -> None:
        super().on_release(blocks)
        self._worth[blocks] = 0.0

    def rank(self, blocks: IntArray) -> FloatArray:
        return self._worth[blocks]

    def victims(self, n: int, candidates: IntArray) -> IntArray:
        """Of equal worth the older one, and of two classes the lower one."""
        rank = self.rank(candidates)
        if 0 < n < len(candidates):
            near = np.flatnonzero(rank <= np.partition(rank, n - 1)[n - 1])
            candidates, rank = candidates[near], rank[near]
        return candidates[np.lexsort((self.queues.place[candidates], rank))[: max(n, 0)]]

    def coldest(self, n: int) -> IntArray:
        queues = self.queues
        some = [queues.oldest(number, n) for number in range(1 + self.num_queues) if queues.size[number]]
        candidates = np.concatenate(some) if some else np.empty(0, np.int64)
        left = candidates[np.argsort(self._worth[candidates], kind="stable")[:n]]
        return left

    def on_evict(self, blocks: IntArray) -> None:
        if len(blocks):
            self._age = max(self._age, float(self._worth[blocks].max()))
        super().on_evict(blocks)
