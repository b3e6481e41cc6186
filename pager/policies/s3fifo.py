"""S3-FIFO: a small queue filters one-hit wonders, a main queue gives second chances, ghosts skip the filter.

Source: Yang and others, "FIFO queues are all you need for cache eviction" (SOSP 2023): a tenth of the capacity is small,
more than one use there leads to the main queue, three second chances at most.
"""

from __future__ import annotations

import numpy as np

from .base import _FIRST_SIZE, IntArray, resized
from .queues import RELEASED, GhostPolicy, by_place

_SMALL, _MAIN = 1, 2
_SMALL_SHARE, _MOST_USES = 0.1, 3


class S3Fifo(GhostPolicy):
    name = "s3fifo"
    num_queues = 2

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small = max(1, int(self.capacity * _SMALL_SHARE))
        self._uses = np.zeros(_FIRST_SIZE, np.int8)

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        if num_ids > len(self._uses):
            self._uses = resized(self._uses, len(self.depth), 0)

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        known = self.ghosts.place[blocks] >= 0
        self.ghosts.remove(blocks[known])
        self._uses[blocks] = 0
        self.queues.push(_SMALL, blocks[~known][::-1])
        self.queues.push(_MAIN, blocks[known][::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self.queues.push(_MAIN, blocks[self.queues.queue_of(blocks) == RELEASED])
        self._uses[blocks] = np.minimum(self._uses[blocks] + 1, _MOST_USES)

    def on_evict(self, blocks: IntArray) -> None:
        self.ghosts.push(0, blocks[self.queues.queue_of(blocks) == _SMALL])
        super().on_evict(blocks)
        self.ghosts.drop_oldest(0, self.capacity - self._small)

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

    # ------------------------------------------------------------------ of those that may go, in a pager at work
    def victims(self, n: int, candidates: IntArray) -> IntArray:
        """As `coldest` would go about it; who is passed over gets its second chance when somebody leaves."""
        released, small, main = (by_place(self.queues, candidates, queue) for queue in (RELEASED, _SMALL, _MAIN))
        surplus = max(0, self.queues.size[_SMALL] - self._small + 1)
        first, rest = small[:surplus], small[surplus:]
        is_used = self._uses[first] > 1
        chances = np.concatenate([self._uses[main], np.zeros(int(is_used.sum()), np.int8)])
        again = np.concatenate([main, first[is_used]])[np.argsort(chances, kind="stable")]
        return np.concatenate([released, first[~is_used], again, rest])[: max(n, 0)]

    def on_leave(self, blocks: IntArray) -> None:
        queue = self.queues.queue_of(blocks)
        num_small, num_main = int((queue == _SMALL).sum()), int((queue == _MAIN).sum())
        used = self._passed(_SMALL, num_small, 1)
        if num_main and not num_small:  # all that the small queue has too many were passed over
            many = self.queues.oldest(_SMALL, max(0, self.queues.size[_SMALL] - self._small + 1))
            used = many[self._uses[many] > 1]
        self._uses[used] = 0
        self.queues.push(_MAIN, used)
        if num_main:
            self._go_round(num_main)
        self.on_evict(blocks)

    def _go_round(self, n: int) -> None:
        """The main queue turns until n without a chance left have been met."""
        everyone = self.queues.oldest(_MAIN, n)
        while self._uses[everyone].all():
            if len(everyone) < self.queues.size[_MAIN]:
                everyone = self.queues.oldest(_MAIN, self.queues.size[_MAIN])
            else:
                self._uses[everyone] -= 1
        used = self._passed(_MAIN, n, 0)
        self._uses[used] -= 1
        self.queues.push(_MAIN, used)

    def _passed(self, queue: int, n: int, least_uses: int) -> IntArray:
        """Those at the old end with more uses than that, up to where n with no more of them have been met."""
        look = 2 * n + 16
        while n:
            some = self.queues.oldest(queue, look)
            stays = self._uses[some] > least_uses
            if len(some) < look or int((~stays).sum()) >= n:
                last = int(np.searchsorted(np.cumsum(~stays), n)) + 1
                return some[:last][stays[:last]]
            look *= 2
        return np.empty(0, np.int64)
