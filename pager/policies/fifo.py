"""First in, first out: use changes nothing. The baseline that shows what recency is worth.

Source: the oldest rule there is; Belady, "A study of replacement algorithms" (IBM Systems Journal 5(2), 1966).
"""

from __future__ import annotations

from .base import IntArray
from .queues import RELEASED, QueuePolicy

_ALL = 1


class Fifo(QueuePolicy):
    name = "fifo"

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self.queues.push(_ALL, blocks[::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self.queues.push(_ALL, blocks[self.queues.queue_of(blocks) == RELEASED])
