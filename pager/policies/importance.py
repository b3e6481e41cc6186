"""Blocks that draw little attention leave first; by recency among equals.

Fed by `on_mass`: each block's share of the attention of a sampled step. Until its first sample a block counts as the most
attended, so that nothing is judged unseen.
Source: H2O (arXiv 2306.14048): few tokens carry most of the mass, and the recent ones must be kept beside them.
"""

from __future__ import annotations

import numpy as np

from .base import _FIRST_SIZE, FloatArray, IntArray, resized
from .queues import RELEASED, QueuePolicy

_CLASSES = 24  # of mass, one to a halving
_NEW = 0.2  # weight of a sample in the running mean; the first one is the mean


class Importance(QueuePolicy):
    name = "importance"
    num_queues = _CLASSES

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._mass = np.ones(_FIRST_SIZE)
        self._is_sampled = np.zeros(_FIRST_SIZE, bool)

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        if num_ids > len(self._mass):
            self._mass = resized(self._mass, len(self.depth), 1.0)
            self._is_sampled = resized(self._is_sampled, len(self.depth), 0)

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self._mass[blocks] = 1.0
        self._is_sampled[blocks] = False
        self._put(blocks)

    def on_hit(self, blocks: IntArray) -> None:
        self._put(blocks)

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        self._put(blocks)

    def on_mass(self, blocks: IntArray, mass: FloatArray) -> None:
        """Mass is relative: 1 for the block that drew most in this step."""
        self._mass[blocks] += np.where(self._is_sampled[blocks], _NEW, 1.0) * (mass - self._mass[blocks])
        self._is_sampled[blocks] = True
        moved = self._queue_for(blocks) != self.queues.queue_of(blocks)
        self._put(blocks[moved & (self.queues.queue_of(blocks) != RELEASED)])

    def _queue_for(self, blocks: IntArray) -> IntArray:
        halvings = -np.log2(np.maximum(self._mass[blocks], 2.0**-_CLASSES))
        return np.clip(_CLASSES - halvings.astype(np.int64), 1, _CLASSES)

    def _put(self, blocks: IntArray) -> None:
        queue = self._queue_for(blocks)
        for number in np.unique(queue).tolist():
            self.queues.push(number, blocks[queue == number][::-1])
