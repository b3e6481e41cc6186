"""Least recently used: the block whose last use is longest ago leaves first; one use of a chain leaves from its end.

Source: the rule of every pager since Belady, "A study of replacement algorithms" (IBM Systems Journal 5(2), 1966).
"""

from __future__ import annotations

from .base import UNKNOWN, BoolArray, IntArray, Request
from .queues import QueuePolicy

_ALL = 1


class Lru(QueuePolicy):
    name = "lru"

    def on_chain(self, chain: IntArray, held: BoolArray, request: Request = UNKNOWN) -> None:
        self.queues.push(_ALL, chain[::-1])

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self.queues.push(_ALL, blocks[::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self.queues.push(_ALL, blocks[::-1])

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        self.queues.push(_ALL, blocks[::-1])
