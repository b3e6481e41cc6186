"""2Q: newcomers pass through a short queue and are remembered as ghosts; only who comes back while a ghost stays long.

Source: Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement algorithm" (VLDB 1994), the
full version, with its shares: a quarter for newcomers, ghosts for half of the capacity.
"""

from __future__ import annotations

import numpy as np

from .base import IntArray
from .queues import RELEASED, GhostPolicy, by_place

_IN, _MAIN = 1, 2
_IN_SHARE, _GHOST_SHARE = 0.25, 0.5


class TwoQueue(GhostPolicy):
    name = "2q"
    num_queues = 2

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._most_in = max(1, int(self.capacity * _IN_SHARE))
        self._most_ghosts = max(1, int(self.capacity * _GHOST_SHARE))

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        known = self.ghosts.place[blocks] >= 0
        self.ghosts.remove(blocks[known])
        self.queues.push(_IN, blocks[~known][::-1])
        self.queues.push(_MAIN, blocks[known][::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self.queues.push(_MAIN, blocks[self.queues.queue_of(blocks) != _IN][::-1])

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        """A step is no second request: who was released and is read after all begins again."""
        self.queues.push(_IN, blocks[self.queues.queue_of(blocks) == RELEASED][::-1])

    def on_evict(self, blocks: IntArray) -> None:
        self.ghosts.push(0, blocks[self.queues.queue_of(blocks) == _IN])
        super().on_evict(blocks)
        self.ghosts.drop_oldest(0, self._most_ghosts)

    def coldest(self, n: int) -> IntArray:
        surplus = max(0, self.queues.size[_IN] - self._most_in)
        return self.coldest_of(n, [(_IN, surplus), (_MAIN, n), (_IN, n)])

    def victims(self, n: int, candidates: IntArray) -> IntArray:
        released, new, main = (by_place(self.queues, candidates, queue) for queue in (RELEASED, _IN, _MAIN))
        surplus = max(0, self.queues.size[_IN] - self._most_in)
        return np.concatenate([released, new[:surplus], main, new[surplus:]])[: max(n, 0)]
