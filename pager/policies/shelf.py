"""What one order of leaving keeps of each segment, real or as a shadow that only counts.

A shelf holds [low, high) of a segment and gives up from its high end; who gives up first is the segment of lowest score.
Scores may change as time goes by: a heap has them as they were, each is looked at again before it is believed, and all
are made anew when an eighth of them left (a fall of one in between goes unseen; no score that rose is acted upon).
"""

from __future__ import annotations

import heapq
from typing import Protocol

import numpy as np

from .base import _FIRST_SIZE, NOWHERE, FloatArray, IntArray, resized
from .segments import Run, Segments

_FEW = 64  # segments, of which all are scored for every one that leaves


class Order(Protocol):
    """Scores of segments; the lowest leaves first."""

    name: str
    is_fading: bool  # scores may fall without any use

    def score(self, segment: int) -> float: ...

    def scores(self, segments: IntArray) -> FloatArray: ...

    def scores_of_times(self, used_s: FloatArray) -> FloatArray:
        """Of blocks in no segment, by their last use."""


class Shelf:
    """Parts of segments, at most `capacity` blocks after `trim`."""

    def __init__(self, segments: Segments, order: Order, capacity: int) -> None:
        self._segments, self.order, self._capacity = segments, order, capacity
        self.high = np.zeros(_FIRST_SIZE, np.int64)
        self.used = 0
        self._heap: list[tuple[float, int]] = []
        self._left_since_scored, self._num_scored = 0, 0

    def copy(self, order: Order) -> Shelf:
        """The same content with another order of leaving."""
        twin = Shelf(self._segments, order, self._capacity)
        twin.high, twin.used = self.high.copy(), self.used
        twin._score_all()
        return twin

    def hit(self, runs: list[Run]) -> int:
        """How far a chain of these runs is held from its root on."""
        end = 0
        for segment, begin, stop in runs:
            end = min(stop, int(self.high[segment])) if self.high[segment] > begin else begin
            if end < stop:
                return end
        return end

    def leave(self, runs: list[Run]) -> None:
        """These runs go over to another segment; call before they do."""
        low, common = self._segments.low, self._segments.is_common
        for segment, _, stop in runs:
            if common[segment]:
                if self.high[segment] < stop:
                    self.used += stop - max(int(self.high[segment]), int(low[segment]))
                    self._set(segment, stop)
            else:
                self.used -= max(0, min(int(self.high[segment]), stop) - int(low[segment]))

    def add(self, segment: int, high: int) -> None:
        """A new segment, of which all up to `high` is here."""
        if segment >= len(self.high):
            self.high = resized(self.high, len(self._segments.start_s), 0)
        self.used += high - int(self._segments.low[segment])
        self._set(segment, high)

    def extend(self, segment: int, added: int) -> None:
        """A segment got more blocks at its end; they are here if what lies before them is."""
        if self.high[segment] == self._segments.size[segment] - added:
            self.used += added
            self._set(segment, int(self._segments.size[segment]))

    def keep(self, kept: IntArray) -> None:
        """As `Segments.keep`, after it."""
        high = np.zeros(max(_FIRST_SIZE, len(self._segments.start_s)), np.int64)
        high[: len(kept)] = self.high[kept]
        self.high = high
        self.used = int(np.maximum(high[: len(kept)] - self._segments.low[: len(kept)], 0).sum())
        self._score_all()

    def _set(self, segment: int, high: int) -> None:
        self.high[segment] = high
        heapq.heappush(self._heap, (self.order.score(segment), segment))

    def cut(self, segment: int, high: int) -> None:
        """Give up what lies at and past `high`."""
        self.used -= int(self.high[segment]) - high
        self.high[segment] = high

    def give_up(self, n: int) -> list[Run]:
        """Up to n blocks of the lowest segments, which leave the shelf, as parts of their chains."""
        given = []
        while n > 0:
            segment = self._pop()
            if segment == NOWHERE:
                break
            low, high = int(self._segments.low[segment]), int(self.high[segment])
            cut = max(low, high - n)
            self.cut(segment, cut)
            if cut > low:
                heapq.heappush(self._heap, (self.order.score(segment), segment))
            given.append((segment, cut, high))
            n -= high - cut
            self._left_since_scored += 1
        return given

    def trim(self) -> None:
        if self.used > self._capacity:
            self.give_up(self.used - self._capacity)

    def _pop(self) -> int:
        """The segment of lowest score that has something here."""
        few = self._num_scored < _FEW
        if self.order.is_fading and self._left_since_scored > (0 if few else self._num_scored // 8):
            self._score_all()
        low, heap = self._segments.low, self._heap
        while heap:
            _, segment = heapq.heappop(heap)
            if self.high[segment] <= low[segment]:
                continue
            score = self.order.score(segment)
            if not heap or score <= heap[0][0]:
                return segment
            heapq.heappush(heap, (score, segment))
        return NOWHERE

    def _score_all(self) -> None:
        count = min(self._segments.count, len(self.high))
        held = np.flatnonzero(self.high[:count] > self._segments.low[:count])
        self._heap = list(zip(self.order.scores(held).tolist(), held.tolist()))
        heapq.heapify(self._heap)
        self._left_since_scored, self._num_scored = 0, len(held)
