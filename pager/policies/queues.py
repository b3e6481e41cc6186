"""First-in-first-out queues of block ids as arrays: the lists that classic policies are written in.

A queue is a log that is only appended to. A block stands where it was appended last; what it left behind is stale and
skipped when the old end of the log is read. So moving a thousand blocks to the young end is one slice, and each entry is
read once. A block stands in at most one queue of a set; queue 0 holds released blocks, and everything in a lower queue
ranks before everything in a higher one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import _FIRST_SIZE, NOWHERE, IntArray, Policy, resized

_SHIFT = 44  # a place is queue << 44 | index in its log
RELEASED = 0


class Queues:
    """`count` queues over the same blocks."""

    def __init__(self, count: int) -> None:
        self.place = np.full(_FIRST_SIZE, NOWHERE, np.int64)
        self._log = [np.empty(0, np.int64) for _ in range(count)]
        self._index = np.arange(_FIRST_SIZE)
        self._head, self._end = [0] * count, [0] * count
        self.size = [0] * count
        self._stale_seen = [0] * count  # entries skipped since the log was compacted
        self.mark = [0] * count  # a hand in each log, kept at its block when the log is compacted

    def grow(self, num_ids: int) -> None:
        if num_ids > len(self.place):
            self.place = resized(self.place, max(num_ids, 2 * len(self.place)), NOWHERE)

    def queue_of(self, blocks: IntArray) -> IntArray:
        """The queue that each stands in, -1 for none."""
        return self.place[blocks] >> _SHIFT

    def remove(self, blocks: IntArray) -> None:
        self._leave(blocks)
        self.place[blocks] = NOWHERE

    def push(self, queue: int, blocks: IntArray, *, are_new: bool = False) -> None:
        """Append blocks, oldest first, taking them out of where they stand."""
        if not are_new:
            self._leave(blocks)
        self.size[queue] += len(blocks)
        self._append(queue, blocks)

    def _append(self, queue: int, blocks: IntArray) -> None:
        start = self._end[queue]
        stop = start + len(blocks)
        if stop > len(self._log[queue]):
            start = self._compact(queue, len(blocks))
            stop = start + len(blocks)
        self._log[queue][start:stop] = blocks
        self.place[blocks] = self._index[start:stop] + (queue << _SHIFT) if queue else self._index[start:stop]
        self._end[queue] = stop

    def oldest(self, queue: int, n: int) -> IntArray:
        """Up to n blocks from the old end, which keep their places."""
        if self._stale_seen[queue] > self._end[queue] - self._head[queue]:
            self._compact(queue, 0)  # old blocks that stay, and stale entries behind them that were read often enough
        log, end, found, count = self._log[queue], self._end[queue], [], 0
        at = self._head[queue]
        while at < end and count < n:
            stop = min(end, at + 2 * (n - count) + 16)
            some = log[at:stop]
            current = some[self.place[some] == self._index[at:stop] + (queue << _SHIFT)]
            if not count and not len(current):
                self._head[queue] = stop  # nothing but stale entries: never read again
            elif count:
                self._stale_seen[queue] += len(some) - len(current)
            found.append(current)
            count += len(current)
            at = stop
        return (found[0] if len(found) == 1 else np.concatenate(found))[:n] if found else log[:0]

    def drop_oldest(self, queue: int, most: int) -> None:
        """Keep the youngest `most`."""
        if self.size[queue] > most:
            self.remove(self.oldest(queue, self.size[queue] - most))

    def scan(self, queue: int, n: int) -> IntArray:
        """The blocks from the mark on, up to n of them; none at the young end. The mark skips stale entries only."""
        log, end = self._log[queue], self._end[queue]
        while (start := max(self.mark[queue], self._head[queue])) < end:
            stop = min(end, start + n)
            some = log[start:stop]
            current = some[self.place[some] == self._index[start:stop] + (queue << _SHIFT)]
            if len(current):
                return current
            self.mark[queue] = stop
        return log[:0]

    def mark_place(self, queue: int) -> int:
        """What places are compared with to see whether they are before the mark."""
        return (queue << _SHIFT) + self.mark[queue]

    def behind(self, queue: int, block: int) -> int:
        """The mark just behind a block; behind the youngest one it is back at the old end."""
        after = (int(self.place[block]) & ((1 << _SHIFT) - 1)) + 1
        return after if after < self._end[queue] else 0

    def _leave(self, blocks: IntArray) -> None:
        if len(self.size) == 1:
            self.size[0] -= int(np.count_nonzero(self.place[blocks] >= 0))
            return
        counts = np.bincount(self.queue_of(blocks) + 1, minlength=len(self.size) + 1)
        for queue in np.flatnonzero(counts[1:]).tolist():
            self.size[queue] -= int(counts[queue + 1])

    def _compact(self, queue: int, room: int) -> int:
        """Copy the current entries to the front of a log with room for as many again. Returns where it ends."""
        head, end = self._head[queue], self._end[queue]
        some = self._log[queue][head:end]
        is_current = self.place[some] == self._index[head:end] + (queue << _SHIFT)
        self.mark[queue] = int(np.count_nonzero(is_current[: max(0, self.mark[queue] - head)]))
        current = some[is_current]
        log = np.empty(max(_FIRST_SIZE, 3 * len(current) + 8 * room), np.int64)
        if len(log) > len(self._index):
            self._index = np.arange(len(log))
        log[: len(current)] = current
        self.place[current] = self._index[: len(current)] + (queue << _SHIFT)
        self._log[queue], self._head[queue], self._end[queue] = log, 0, len(current)
        self._stale_seen[queue] = 0
        return len(current)


def by_place(queues: Queues, blocks: IntArray, queue: int) -> IntArray:
    """Those of these blocks that stand in a queue, oldest first."""
    place = queues.place[blocks]
    own = np.flatnonzero(place >> _SHIFT == queue)
    return blocks[own[np.argsort(place[own])]]


class QueuePolicy(Policy):
    """A policy whose whole state is where in which queue a block stands."""

    num_queues = 1  # besides the one for released blocks

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queues = Queues(1 + self.num_queues)

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        self.queues.grow(num_ids)

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        """Recency means nothing here; but who is used again after all need not go first."""
        released = blocks[self.queues.queue_of(blocks) == RELEASED]
        if len(released):
            self.on_hit(released)

    def on_release(self, blocks: IntArray) -> None:
        held = blocks[self.queues.place[blocks] >= 0]
        self.queues.push(RELEASED, held[::-1])

    def on_evict(self, blocks: IntArray) -> None:
        self.queues.remove(blocks)

    def rank(self, blocks: IntArray) -> npt.NDArray[Any]:
        return self.queues.place[blocks]

    def memory_of(self, block: int) -> int:
        """What should be remembered of a block whose id ends, NOWHERE for nothing."""
        return NOWHERE

    def on_return(self, block: IntArray, memory: int) -> None:
        """This new block, an array of one, is one of which that was remembered."""

    def renew(self, blocks: IntArray, queues: tuple[int, ...]) -> None:
        """Those that stand in these queues become the youngest there; released ones, of the first of them."""
        standing = self.queues.queue_of(blocks)
        standing[standing == RELEASED] = queues[0]
        for queue in queues:
            self.queues.push(queue, blocks[standing == queue][::-1])

    def coldest(self, n: int) -> IntArray:
        return self.coldest_of(n, range(1, 1 + self.num_queues))

    def coldest_of(self, n: int, order: Iterable[int | tuple[int, int]]) -> IntArray:
        """Released blocks, then from these queues in turn; of a pair, so many at most from that queue."""
        taken: list[IntArray] = []
        named: dict[int, int] = {}  # of a queue that stands in the order twice
        for entry in (RELEASED, *order):
            queue, most = entry if isinstance(entry, tuple) else (entry, n)
            already = named.get(queue, 0)
            if min(n, most) > 0 and self.queues.size[queue] > already:
                taken.append(self.queues.oldest(queue, already + min(n, most))[already:])
                named[queue] = already + len(taken[-1])
                n -= len(taken[-1])
        if len(taken) == 1:
            return taken[0]
        return np.concatenate(taken) if taken else np.empty(0, np.int64)


class GhostPolicy(QueuePolicy):
    """One that remembers who left, in queues of their own: `ghosts`, over the same ids."""

    num_ghosts = 1

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.ghosts = Queues(self.num_ghosts)

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        self.ghosts.grow(num_ids)

    def on_forget(self, blocks: IntArray) -> None:
        self.queues.remove(blocks)
        self.ghosts.remove(blocks)

    def memory_of(self, block: int) -> int:
        return int(self.ghosts.place[block]) >> _SHIFT

    def on_return(self, block: IntArray, memory: int) -> None:
        self.ghosts.push(memory, block)
        self.on_insert(block, self.depth[block])
