"""ARC: one list of chains used once, one of chains used again, and ghosts of both that say which deserves more room.

Source: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST 2003), with chains inserted whole:
all of a request's ghosts move the target before anybody leaves.
"""

from __future__ import annotations

import numpy as np

from .base import IntArray
from .queues import RELEASED, GhostPolicy, by_place

_ONCE, _AGAIN = 1, 2


class Arc(GhostPolicy):
    name = "arc"
    num_queues = 2
    num_ghosts = 3  # numbered as the lists that they left

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._target = 0.0  # blocks that _ONCE should have

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        ghosts, left = self.ghosts, self.ghosts.queue_of(blocks)
        of_once, of_again = int((left == _ONCE).sum()), int((left == _AGAIN).sum())
        once, again = max(1, ghosts.size[_ONCE]), max(1, ghosts.size[_AGAIN])
        self._target += of_once * max(1.0, again / once) - of_again * max(1.0, once / again)
        self._target = min(max(self._target, 0.0), float(self.capacity))
        known = left >= 0
        ghosts.remove(blocks[known])
        self.queues.push(_ONCE, blocks[~known][::-1])
        self.queues.push(_AGAIN, blocks[known][::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self.queues.push(_AGAIN, blocks[::-1])

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        self.renew(blocks, (_ONCE, _AGAIN))

    def on_evict(self, blocks: IntArray) -> None:
        left = self.queues.queue_of(blocks)
        for queue in (_ONCE, _AGAIN):
            self.ghosts.push(queue, blocks[left == queue])
        super().on_evict(blocks)
        size, ghosts = self.queues.size, self.ghosts
        ghosts.drop_oldest(_ONCE, max(0, self.capacity - size[_ONCE]))
        ghosts.drop_oldest(_AGAIN, max(0, 2 * self.capacity - size[_ONCE] - size[_AGAIN] - ghosts.size[_ONCE]))

    def coldest(self, n: int) -> IntArray:
        return self.coldest_of(n, [(_ONCE, self._surplus()), (_AGAIN, n), (_ONCE, n)])

    def victims(self, n: int, candidates: IntArray) -> IntArray:
        released, once, again = (by_place(self.queues, candidates, queue) for queue in (RELEASED, _ONCE, _AGAIN))
        surplus = self._surplus()
        return np.concatenate([released, once[:surplus], again, once[surplus:]])[: max(n, 0)]

    def _surplus(self) -> int:
        return int(max(0, np.ceil(self.queues.size[_ONCE] - self._target)))
