"""ARC: one list of chains used once, one of chains used again, and ghosts of both that say which deserves more room.

Source: Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST 2003), with chains inserted whole:
all of a request's ghosts move the target before anybody leaves.
"""

from __future__ import annotations

import numpy as np

from .base import IntArray
from .queues import QueuePolicy, Queues

_ONCE, _AGAIN = 1, 2


class Arc(QueuePolicy):
    name = "arc"
    num_queues = 2

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ghosts = Queues(3)  # numbered as the lists that they left
        self._target = 0.0  # blocks that _ONCE should have

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        self._ghosts.grow(num_ids)

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        ghosts, left = self._ghosts, self._ghosts.queue_of(blocks)
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
            self._ghosts.push(queue, blocks[left == queue])
        super().on_evict(blocks)
        size, ghosts = self.queues.size, self._ghosts
        ghosts.drop_oldest(_ONCE, max(0, self.capacity - size[_ONCE]))
        ghosts.drop_oldest(_AGAIN, max(0, 2 * self.capacity - size[_ONCE] - size[_AGAIN] - ghosts.size[_ONCE]))

    def on_forget(self, blocks: IntArray) -> None:
        super().on_evict(blocks)
        self._ghosts.remove(blocks)

    def coldest(self, n: int) -> IntArray:
        surplus = int(max(0, np.ceil(self.queues.size[_ONCE] - self._target)))
        return self.coldest_of(n, [(_ONCE, surplus), (_AGAIN, n), (_ONCE, n)])
