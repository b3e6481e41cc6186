"""Blocks outside the last `window_tokens` leave first, the first `sink_tokens` last, by recency within each class.

Source: attention sinks, StreamingLLM (arXiv 2309.17453): the first tokens draw attention mass at any length, so they are
the worst blocks to lose; everything between them and the window is the best.
"""

from __future__ import annotations

import numpy as np

from ...tiers.errors import ConfigError
from .base import UNKNOWN, BoolArray, IntArray, Request
from .queues import QueuePolicy

_OUTSIDE, _INSIDE, _SINK = 1, 2, 3


class SlidingWindow(QueuePolicy):
    name = "sliding_window"
    num_queues = 3

    def __init__(self, capacity: int, window_tokens: int, sink_tokens: int, block_size: int) -> None:
        super().__init__(capacity)
        if window_tokens < 1:
            raise ConfigError(f"window={window_tokens}: the sliding_window policy needs a window of at least 1 token")
        self._window, self._block_size = window_tokens, block_size
        self._sink_blocks = -(-sink_tokens // block_size)

    def on_chain(self, chain: IntArray, held: BoolArray, request: Request = UNKNOWN) -> None:
        depth = np.arange(len(chain))
        self.depth[chain] = depth
        self._put(chain, (len(chain) - 1 - depth) * self._block_size)

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self.depth[blocks] = depth
        self._put(blocks, np.zeros(len(blocks), np.int64))

    def on_hit(self, blocks: IntArray) -> None:
        self._put(blocks, np.zeros(len(blocks), np.int64))

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        if distance_tokens is None:
            self.renew(blocks, (_INSIDE, _OUTSIDE, _SINK))
        else:
            self._put(blocks, distance_tokens)

    def _put(self, blocks: IntArray, distance_tokens: IntArray) -> None:
        queue = np.where(distance_tokens < self._window, _INSIDE, _OUTSIDE)
        queue[self.depth[blocks] < self._sink_blocks] = _SINK
        for number in (_OUTSIDE, _INSIDE, _SINK):
            self.queues.push(number, blocks[queue == number][::-1])
