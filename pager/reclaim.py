"""Keeps segments of the cold tier clean, so that puts go to the front of an empty one and never wait.

The emptiest segment goes first where it holds little (released blocks aside): its blocks are moved, nothing is lost.
Where the tier is full, the oldest goes (FIFO): blocks that were read since they were written, that are pinned or that
somebody refers to are moved, up to a share of the segment, and the others are evicted. A segment that must keep more
than that stays as it is and counts as young again, so that the bytes written twice stay within 1 / (1 - share) of those
that were put.
Source: CacheLib's block cache reclaims regions in FIFO order and re-inserts hit items; the emptiest-first step is the
cleaning of a log-structured file system (Rosenblum and Ousterhout, 1992).
"""

from __future__ import annotations

import numpy as np

from ..tiers.errors import TierFullError
from . import hints
from .cold import ColdSide
from .states import IntArray

CLEAN_SEGMENTS = 2  # kept ready
SEGMENTS_PER_AHEAD = 16  # of a tier, for each one more: up to as many again, so that two are left while others are made
MIN_SEGMENTS = 8  # a tier of fewer has none to spare: its holes are filled instead
MOVED_SHARE = 0.25  # of a segment, at most, is written again
HOLE_SEGMENTS = 3  # with this many segments' worth of holes the tier is not full, and nothing is evicted
LOOKS = 8  # segments looked at in one go
REST_S = 1.0  # after nothing could be done, unless a segment more is filled


class Reclaimer:
    """Of one layer group. The pager's lock is held by whoever calls."""

    def __init__(self, cold: ColdSide) -> None:
        assert cold.ring is not None
        self._cold, self._group, self._tier, self._index = cold, cold.group, cold.ring, cold.index
        self._size = self._tier.geometry(self._index).slots_per_segment
        self._cap = int(self._size * MOVED_SHARE)  # none of a small segment: moving all of it would go on for ever
        self._rests_until_s, self._clean_at_rest = float("-inf"), 0

    def keep_clean(self) -> None:
        """Start making as many segments clean as are missing; those on their way count."""
        self._cold.give_back_left()
        segments, clean = self._tier.num_segments(self._index), self._tier.num_clean(self._index)
        if segments < MIN_SEGMENTS or not self._cold.takes_writes:
            return
        if self._group.clock() < self._rests_until_s and clean >= self._clean_at_rest:
            return
        ahead = min(CLEAN_SEGMENTS, segments // SEGMENTS_PER_AHEAD)
        coming = len(self._group.relocations())
        for _ in range(CLEAN_SEGMENTS + ahead - clean - coming):
            if not any(self._reclaim(int(segment)) for segment in self._candidates()):
                if not coming:  # what is on its way makes room
                    self._rests_until_s, self._clean_at_rest = self._group.clock() + REST_S, clean
                return

    def _candidates(self) -> IntArray:
        segments, used = self._tier.sealed(self._index)
        moving = [move.source // self._size for move in self._group.relocations()]
        is_left = ~np.isin(segments, np.concatenate([segments[:0], *moving]))
        segments, used = segments[is_left], used[is_left]
        if not len(segments):
            return segments
        used = used - self._given_up(segments)
        emptiest = segments[[int(np.argmin(used))]] if int(used.min()) <= self._cap else segments[:0]
        holes = self._tier.free_slots(self._index) - self._tier.num_clean(self._index) * self._size
        return np.concatenate([emptiest, segments[:LOOKS]]) if holes < HOLE_SEGMENTS * self._size else emptiest

    def _given_up(self, segments: IntArray) -> IntArray:
        """Per segment its released blocks: they count as room."""
        d = self._group.directory
        stored = np.flatnonzero(d.is_released & d.nvme_valid)
        stored = stored[hints.given_up(self._group, stored)]
        counts = np.bincount(d.nvme_slot[stored] // self._size, minlength=self._tier.num_segments(self._index))
        return counts[segments]

    def _reclaim(self, segment: int) -> bool:
        """Evict and move until nothing is left in the segment. False when it has to stay."""
        d, group = self._group.directory, self._group
        first = segment * self._size
        blocks = np.flatnonzero((d.nvme_slot >= first) & (d.nvme_slot < first + self._size))
        if (d.nvme_holds[blocks] > 0).any() or not d.nvme_valid[blocks].all():
            return False
        spare = np.isin(blocks, self._cold.quotas.spare(group, "nvme", blocks, None))
        must = (d.refs[blocks] > 0) | (d.pinned_until[blocks] > group.clock()) | ~spare
        if int(must.sum()) > self._cap:
            self._tier.retain(self._index, segment)
            group.counters.add("retained_segments", 1)
            return False
        kept = blocks[must]
        over = hints.given_up(group, blocks)
        is_light = len(blocks) - int(over.sum()) <= self._cap
        may_stay = blocks[~must & ~over & (is_light | d.nvme_hit[blocks])]
        coldest_first = group.policy.of("nvme").victims(len(may_stay), may_stay)
        kept = np.concatenate([kept, coldest_first[max(0, len(may_stay) - (self._cap - len(kept))) :]])
        try:
            targets = self._tier.allocate(self._index, len(kept), not_in=segment)
        except TierFullError:
            return False
        self._cold.drop_copies(np.setdiff1d(blocks, kept), "reclaim")
        group.counters.add("reclaimed_segments", 1)
        if len(kept):
            self._cold.relocate(kept[np.argsort(d.nvme_slot[kept])], targets)
        return True
