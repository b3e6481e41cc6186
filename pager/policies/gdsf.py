"""GreedyDual-Size-Frequency: a block's value is its uses, and age overtakes it. All blocks of a group have one size.

Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy" (HP Labs 1998), with
cost and size 1. Uses stop at 16.
"""

from __future__ import annotations

import numpy as np

from .base import IntArray
from .costed import Costed

_MOST_USES = 16


class Gdsf(Costed):
    name = "gdsf"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, np.arange(1.0, _MOST_USES + 1))

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self.put(blocks, np.zeros(len(blocks), np.int64))

    def on_hit(self, blocks: IntArray) -> None:
        uses = np.maximum(self.queues.queue_of(blocks), 0)  # a queue is a count of uses; released ones begin again
        self.put(blocks, np.minimum(uses, _MOST_USES - 1))
