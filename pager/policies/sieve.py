"""SIEVE: one queue that is never reordered, a bit per block, and a hand that passes over those used since it came by.

Source: Zhang and others, "SIEVE is simpler than LRU" (NSDI 2024).
"""

from __future__ import annotations

import numpy as np

from .base import _FIRST_SIZE, IntArray, resized
from .queues import RELEASED, QueuePolicy

_ALL = 1


class Sieve(QueuePolicy):
    name = "sieve"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._is_visited = np.zeros(_FIRST_SIZE, bool)

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        if num_ids > len(self._is_visited):
            self._is_visited = resized(self._is_visited, len(self.depth), 0)

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self._is_visited[blocks] = False
        self.queues.push(_ALL, blocks[::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self.queues.push(_ALL, blocks[self.queues.queue_of(blocks) == RELEASED])
        self._is_visited[blocks] = True

    def rank(self, blocks: IntArray) -> IntArray:
        """Unvisited ones from the hand on, then those behind it, then visited ones."""
        place, stands = self.queues.place[blocks], self.queues.queue_of(blocks) == _ALL
        behind = stands & (place < self.queues.mark_place(_ALL))
        visited = stands & self._is_visited[blocks]
        return place + (behind.astype(np.int64) << 50) + (visited.astype(np.int64) << 51)

    def on_leave(self, blocks: IntArray) -> None:
        """The hand comes by as many unvisited ones as have left of them."""
        n = int((self.queues.queue_of(blocks) == _ALL).sum())
        while n > 0:
            n -= len(self._come_by(n))
        self.on_evict(blocks)

    def coldest(self, n: int) -> IntArray:
        queues, left = self.queues, [self.queues.oldest(RELEASED, n)]
        n = min(n, queues.size[RELEASED] + queues.size[_ALL]) - len(left[0])
        while n > 0:
            left.append(self._come_by(n))
            queues.remove(left[-1])
            n -= len(left[-1])
        return np.concatenate(left)

    def _come_by(self, n: int) -> IntArray:
        """One move of the hand: the unvisited ones that it finds, up to n; visited ones lose their mark."""
        queues = self.queues
        some = queues.scan(_ALL, 2 * n + 16)
        if not len(some):
            queues.mark[_ALL] = 0  # past the young end: the hand goes on at the old one
            return some
        fresh = ~self._is_visited[some]
        last = int(np.searchsorted(np.cumsum(fresh), n)) + 1
        some, fresh = some[:last], fresh[:last]
        self._is_visited[some] = False
        queues.mark[_ALL] = queues.behind(_ALL, int(some[-1]))
        found: IntArray = some[fresh]
        return found
