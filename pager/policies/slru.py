"""Segmented LRU: newcomers wait on probation, a second request protects; half of the capacity at most is protected.

Source: Karedla, Love, Wherry, "Caching strategies to improve disk system performance" (IEEE Computer 27(3), 1994). They
protect more; an even split does better on chains that are used twice and then never again.
"""

from __future__ import annotations

from .base import IntArray
from .queues import QueuePolicy

_PROBATION, _PROTECTED = 1, 2
_PROTECTED_SHARE = 0.5


class Slru(QueuePolicy):
    name = "slru"
    num_queues = 2

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._most = max(1, int(self.capacity * _PROTECTED_SHARE))

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self.queues.push(_PROBATION, blocks[::-1])

    def on_hit(self, blocks: IntArray) -> None:
        queues = self.queues
        queues.push(_PROTECTED, blocks[::-1])
        if queues.size[_PROTECTED] > self._most:
            queues.push(_PROBATION, queues.oldest(_PROTECTED, queues.size[_PROTECTED] - self._most))

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        self.renew(blocks, (_PROBATION, _PROTECTED))
