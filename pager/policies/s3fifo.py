"""S3-FIFO: a small queue filters one-hit wonders, a main queue gives second chances, ghosts skip the filter.

Source: Yang and others, "FIFO queues are all you need for cache eviction" (SOSP 2023): a tenth of the capacity is small,
more than one use there leads to the main queue, three second chances at most.
"""

from __future__ import annotations

import numpy as np

from .base import _FIRST_SIZE, IntArray, resized
from .queues import RELEASED, QueuePolicy, Queues

_SMALL, _MAIN = 1, 2
_SMALL_SHARE, _MOST_USES = 0.1, 3


class S3Fifo(QueuePolicy):
    name = "s3fifo"
    num_queues = 2

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small = max(1, int(self.capacity * _SMALL_SHARE))
        self._ghosts = Queues(1)
        self._uses = np.zeros(_FIRST_SIZE, np.int8)

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        self._ghosts.grow(num_ids)
        if num_ids > len(self._uses):
            self._uses = resized(self._uses, len(self.depth), 0)

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        known = self._ghosts.place[blocks] >= 0
        self._ghosts.remove(blocks[known])
        self._uses[blocks] = 0
        self.queues.push(_SMALL, blocks[~known][::-1])
        self.queues.push(_MAIN, blocks[known][::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self.queues.push(_MAIN, blocks[self.queues.queue_of(blocks) == RELEASED])
        self._uses[blocks] = np.minimum(self._uses[blocks] + 1, _MOST_USES)

    def on_evict(self, blocks: IntArray) -> None:
        self._ghosts.push(0, blocks[self.queues.queue_of(blocks) == _SMALL])
        super().on_evict(blocks)
        self._ghosts.drop_oldest(0, self.capacity - self._small)

    def on_forget(self, blocks: IntArray) -> None:
        super().on_evict(blocks)
        self._ghosts.remove(blocks)

    def coldest(self, n: int) -> IntArray:
        queues, left = self.queues, [self.queues.oldest(RELEASED, n)]
        n -= len(left[0])
        named = [0, 0, 0]  # of each queue, and still at its old end
        while n > 0 and queues.size[_SMALL] - named[_SMALL] + queues.size[_MAIN] - named[_MAIN] > 0:
            small = queues.size[_SMALL] - named[_SMALL]
            queue = _SMALL if small >= self._small or queues.size[_MAIN] == named[_MAIN] else _MAIN
            enough = n if queue == _MAIN else min(n, max(1, small - self._small + 1))
            some = queues.oldest(queue, named[queue] + enough)[named[queue] :]
            stays = self._uses[some] > (1 if queue == _SMALL else 0)
            self._uses[some[stays]] = 0 if queue == _SMALL else self._uses[some[stays]] - 1
            queues.push(_MAIN, some[stays])
            left.append(some[~stays])
            named[queue] += len(left[-1])
            n -= len(left[-1])
        return np.concatenate(left)
