"""W-TinyLFU: a small window takes all newcomers; to leave it for the main part, one must be asked for more often than
whoever would go.

Source: Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy" (ACM ToS 13(4), 2017): a window of
1 %, a segmented LRU of 80 % protected, counts to 15 that are halved every ten capacities of uses. Counts are exact, by
block id, where the paper sketches them.
"""

from __future__ import annotations

import numpy as np

from .base import _FIRST_SIZE, IntArray, resized
from .queues import RELEASED, QueuePolicy, by_place

_WINDOW, _PROBATION, _PROTECTED = 1, 2, 3
_WINDOW_SHARE, _PROTECTED_SHARE, _MOST_USES, _HALVED_AFTER = 0.01, 0.8, 15, 10


class WTinyLfu(QueuePolicy):
    name = "wtinylfu"
    num_queues = 3

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._window = max(1, int(self.capacity * _WINDOW_SHARE))
        self._main = max(1, self.capacity - self._window)
        self._protected = max(1, int(self._main * _PROTECTED_SHARE))
        self._uses = np.zeros(_FIRST_SIZE, np.int8)
        self._noted = 0

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        if num_ids > len(self._uses):
            self._uses = resized(self._uses, len(self.depth), 0)

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self._note(blocks)
        self.queues.push(_WINDOW, blocks[::-1])

    def on_hit(self, blocks: IntArray) -> None:
        self._note(blocks)
        queues, queue = self.queues, self.queues.queue_of(blocks)
        queues.push(_WINDOW, blocks[queue == _WINDOW][::-1])
        queues.push(_PROTECTED, blocks[queue != _WINDOW][::-1])
        if queues.size[_PROTECTED] > self._protected:
            queues.push(_PROBATION, queues.oldest(_PROTECTED, queues.size[_PROTECTED] - self._protected))

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        self.renew(blocks, (_WINDOW, _PROBATION, _PROTECTED))

    def on_forget(self, blocks: IntArray) -> None:
        super().on_forget(blocks)
        self._uses[blocks] = 0

    def coldest(self, n: int) -> IntArray:
        queues, left = self.queues, [self.queues.oldest(RELEASED, n)]
        queues.remove(left[0])
        n -= len(left[0])
        queues.push(_PROBATION, self._overflow())
        while n > 0:
            some = self._contest(min(n, queues.size[_WINDOW] - self._window))
            if not len(some):
                some = self.coldest_of(n, [_PROBATION, _PROTECTED, _WINDOW])
            if not len(some):
                break
            queues.remove(some)
            left.append(some)
            n -= len(some)
        return np.concatenate(left)

    def _contest(self, n: int) -> IntArray:
        """Of n that must leave the window and as many that would go instead: those asked for less, one of each pair."""
        queues = self.queues
        against = self.coldest_of(n, [_PROBATION, _PROTECTED])
        newcomers = queues.oldest(_WINDOW, min(n, len(against)))
        against = against[: len(newcomers)]
        wins = self._uses[newcomers] > self._uses[against]
        queues.push(_PROBATION, newcomers[wins])
        return np.where(wins, against, newcomers)

    def _overflow(self) -> IntArray:
        """Those that the window has too many and the main part has room for."""
        queues = self.queues
        room = self._main - queues.size[_PROBATION] - queues.size[_PROTECTED]
        return queues.oldest(_WINDOW, max(0, min(room, queues.size[_WINDOW] - self._window)))

    # ------------------------------------------------------------------ of those that may go, in a pager at work
    def victims(self, n: int, candidates: IntArray) -> IntArray:
        """As `coldest` would go about it; nobody moves before somebody leaves."""
        queues, overflow = self.queues, self._overflow()
        released, window, probation, protected = (by_place(queues, candidates, queue) for queue in range(4))
        is_over = np.isin(window, overflow)
        main, window = np.concatenate([probation, window[is_over], protected]), window[~is_over]
        left, n = [released], max(n, 0) - len(released)
        pairs = min(max(n, 0), max(0, queues.size[_WINDOW] - len(overflow) - self._window), len(window), len(main))
        wins = self._uses[window[:pairs]] > self._uses[main[:pairs]]
        left += [np.where(wins, main[:pairs], window[:pairs]), main[:pairs][~wins], main[pairs:]]
        left += [window[:pairs][wins], window[pairs:]]
        return np.concatenate(left)[: n + len(released)]

    def on_leave(self, blocks: IntArray) -> None:
        """Who won against somebody in the main part has the place of that one."""
        self.queues.push(_PROBATION, self._overflow())
        self.on_evict(blocks)
        self.queues.push(_PROBATION, self._overflow())

    def memory_of(self, block: int) -> int:
        return int(self._uses[block])

    def on_return(self, block: IntArray, memory: int) -> None:
        self._uses[block] = min(memory + 1, _MOST_USES)

    def _note(self, blocks: IntArray) -> None:
        self._uses[blocks] = np.minimum(self._uses[blocks] + 1, _MOST_USES)
        self._noted += len(blocks)
        if self._noted >= _HALVED_AFTER * self.capacity:
            self._noted = 0
            self._uses >>= 1
