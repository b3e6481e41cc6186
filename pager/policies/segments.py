"""Segments: the runs of blocks that one request was the last to use, and where each request's chain joins the others.

A request takes over the front of its predecessor's blocks and leaves it the rest, so a chat of many turns is one long
segment and its dead ends are short ones. Where many chains part ways is no session but a common beginning (a system
prompt, a document): it becomes a segment that its users share. What `auto` learns and decides is per segment; a block
only says which one it is in, and within one blocks leave from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import _FIRST_SIZE, NOWHERE, IntArray, resized

_MOST_PARTINGS = 8  # of chains at one block; more make it the end of a common beginning
Run = tuple[int, int, int]  # a segment, and the part [begin, end) of a chain that it owns
_COLUMNS = ("start_s", "time_s", "gap_s", "kind", "low", "size", "turn", "is_open", "is_common")


@dataclass(frozen=True, slots=True)
class Joint:
    """Where a chain joins what is known: after `known` blocks, the last of which `parent` had used last."""

    parent: int  # segment of the session that it continues, NOWHERE for a new one
    known: int
    start: int  # first block of the chain that is its own, behind common beginnings
    first_new: int  # segment made for a new common beginning, or the number that the next one will get


class Segments:
    """Columns by segment number. Numbers grow with time."""

    def __init__(self) -> None:
        self.of_block = np.full(_FIRST_SIZE, NOWHERE, np.int64)
        self._partings = np.zeros(_FIRST_SIZE, np.int32)
        self.count = 0
        self.start_s = np.zeros(_FIRST_SIZE)  # when it began: sorted
        self.time_s = np.zeros(_FIRST_SIZE)  # last use
        self.gap_s = np.zeros(_FIRST_SIZE)  # between its last uses; smoothed for a common beginning
        self.kind = np.zeros(_FIRST_SIZE, np.int64)
        self.low = np.zeros(_FIRST_SIZE, np.int64)  # of its chain it still owns [low, end)
        self.size = np.zeros(_FIRST_SIZE, np.int64)  # of its chain
        self.turn = np.zeros(_FIRST_SIZE, np.int64)
        self.is_open = np.zeros(_FIRST_SIZE, bool)  # of a session that nobody has continued yet
        self.is_common = np.zeros(_FIRST_SIZE, bool)
        self.chain: list[IntArray] = []

    def grow(self, num_ids: int) -> None:
        if num_ids > len(self.of_block):
            self.of_block = resized(self.of_block, max(num_ids, 2 * len(self.of_block)), NOWHERE)
            self._partings = resized(self._partings, len(self.of_block), 0)

    def open(self, chain: IntArray, start: int, now_s: float) -> int:
        """A new segment of chain[start:]. Returns its number."""
        number = self.count
        if number == len(self.start_s):
            for name in _COLUMNS:
                setattr(self, name, resized(getattr(self, name), 2 * number, 0))
        self.start_s[number] = self.time_s[number] = now_s
        self.low[number] = start
        self.size[number] = len(chain)
        self.chain.append(chain)
        self.of_block[chain[start:] if start else chain] = number
        self.count += 1
        return number

    def runs_of(self, chain: IntArray) -> list[Run]:
        """What is known of a chain, by segment, in order."""
        owners = self.of_block[chain]
        known = int(owners.argmin())
        if owners[known] >= 0:
            known = len(chain)
        if not known:
            return []
        owners = owners[:known]
        ends = [*((owners[1:] != owners[:-1]).nonzero()[0] + 1).tolist(), known]
        return [(int(owners[begin]), begin, end) for begin, end in zip([0, *ends], ends)]

    def take_over(self, chain: IntArray, runs: list[Run], now_s: float) -> Joint:
        """These runs leave the segments that they are in; common ones are used in place."""
        start, known, parent = 0, 0, NOWHERE
        for segment, begin, known in runs:
            if self.is_common[segment] and begin == start:
                self._use_common(segment, now_s)
                start = known
            else:
                parent = segment
                if known > self.low[segment]:
                    self.low[segment] = known
        if parent == NOWHERE:
            return Joint(NOWHERE, known, start, self.count)
        return self._joint(chain, parent, known, start, now_s)

    def _joint(self, chain: IntArray, parent: int, known: int, start: int, now_s: float) -> Joint:
        if known >= int(self.size[parent]) - 1:  # all but perhaps a block that was not full
            return Joint(parent, known, start, self.count)
        last = chain[known - 1]
        self._partings[last] += 1
        if self._partings[last] <= _MOST_PARTINGS:
            return Joint(parent, known, start, self.count)
        common = self.open(chain[:known], start, now_s)
        self.is_common[common] = True
        self.gap_s[common] = now_s - self.time_s[parent]
        return Joint(NOWHERE, known, known, common)

    def extend(self, segment: int, chain: IntArray, known: int) -> None:
        """A running request's own segment gets the blocks that it has computed since."""
        self.of_block[chain[known:]] = segment
        self.chain[segment] = chain
        self.size[segment] = len(chain)

    def forget(self, blocks: IntArray) -> None:
        self.of_block[blocks] = NOWHERE
        self._partings[blocks] = 0

    def keep(self, kept: IntArray) -> None:
        """Number these segments anew, from 0, and drop the others."""
        new = np.full(self.count, NOWHERE)
        new[kept] = np.arange(len(kept))
        known = self.of_block >= 0
        self.of_block[known] = new[self.of_block[known]]
        for name in _COLUMNS:
            column = getattr(self, name)
            column[: len(kept)] = column[kept]
            column[len(kept) :] = 0
        self.chain = [self.chain[segment] for segment in kept.tolist()]
        self.count = len(kept)

    def _use_common(self, segment: int, now_s: float) -> None:
        self.gap_s[segment] += 0.25 * (now_s - self.time_s[segment] - self.gap_s[segment])
        self.time_s[segment] = now_s
