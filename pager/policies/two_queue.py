"""2Q: newcomers pass through a short queue and are remembered as ghosts; only who comes back while a ghost stays long.

Source: Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement algorithm" (VLDB 1994), the
full version, with its shares: a quarter for newcomers, ghosts for half of the capacity.
"""

from __future__ import annotations

from .base import IntArray
from .queues import QueuePolicy, Queues

_IN, _MAIN = 1, 2
_IN_SHARE, _GHOST_SHARE = 0.25, 0.5


class TwoQueue(QueuePolicy):
    name = "2q"
    num_queues = 2

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ghosts = Queues(1)
        self._most_in = max(1, int(self.capacity * _IN_SHARE))
        self._most_ghosts = max(1, int(self.capacity * _GHOST_SHARE))

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        self._ghosts.grow(num_ids)

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        known = self._ghosts.place[blocks] >= 0
        self._ghosts.remove(blocks[known])
        self.queues.push(_IN, blocks[~known][::-1])
        self.queues.push(_MAIN, blocks[known][::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self.queues.push(_MAIN, blocks[self.queues.queue_of(blocks) != _IN][::-1])

    def on_evict(self, blocks: IntArray) -> None:
        self._ghosts.push(0, blocks[self.queues.queue_of(blocks) == _IN])
        super().on_evict(blocks)
        self._ghosts.drop_oldest(0, self._most_ghosts)

    def on_forget(self, blocks: IntArray) -> None:
        super().on_evict(blocks)
        self._ghosts.remove(blocks)

    def coldest(self, n: int) -> IntArray:
        surplus = max(0, self.queues.size[_IN] - self._most_in)
        return self.coldest_of(n, [(_IN, surplus), (_MAIN, n), (_IN, n)])
