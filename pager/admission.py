"""Admission: which cached blocks are worth a write to the cold tier, when writes are a budget (bandwidth, endurance).

Promises are always written: what is parked, persisted or drained, and every block that a sequence or session refers to.
They are charged too, so a busy hour of parking leaves less for cache. Cache is written while there is budget: blocks that
somebody has found again at any time, blocks of a first use only while more than half of what may be saved up is there,
and only where loading them is quicker than computing them again (costs.py).
Without a budget all of it is written. What is refused stays above, and is dropped there like any other cache.

Source: second-touch admission is Kangaroo's and CacheLib's guard for flash (McAllister and others, SOSP 2021); the budgets
are token buckets (rates.py) that lend to promises and to nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .costs import Costs
from .rates import TokenBucket
from .states import IntArray

if TYPE_CHECKING:
    from .group import BlockGroup

PROMISES = ("park", "persist", "drain")
DAY_S = 86_400.0
SAVED_DAY_SHARE = 1 / 24  # of a day's budget may be saved up, and used at once
FRESH_LEVEL = 0.5  # of what may be saved up, below which blocks of a first use are not written


class Admission:
    """Of one store. `None` is no limit."""

    def __init__(
        self, bytes_per_s: int | None, bytes_per_day: int | None, clock: Callable[[], float], costs: Costs
    ) -> None:
        self._clock, self._costs, now_s = clock, costs, clock()
        self._buckets: list[tuple[TokenBucket, float]] = []  # and what each may save up
        if bytes_per_s is not None:
            self._buckets.append((TokenBucket(bytes_per_s, now_s), float(bytes_per_s)))
        if bytes_per_day is not None:
            saved = bytes_per_day * SAVED_DAY_SHARE
            self._buckets.append((TokenBucket(bytes_per_day / DAY_S, now_s, burst=saved), saved))

    def may_write(self, group: BlockGroup, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each of these blocks would be written now; where not, it need not be kept for that."""
        if not self._buckets:
            return np.ones(len(blocks), bool)
        level, d = self._level(), group.directory
        if level > FRESH_LEVEL and self._costs.is_load_quicker():
            return np.ones(len(blocks), bool)
        return (d.refs[blocks] > 0) | (d.is_reused[blocks] & (level > 0))

    def choose(self, group: BlockGroup, blocks: IntArray, reason: str) -> IntArray:
        """Those of these blocks, the first ones first, that may be written now for this reason."""
        if not self._buckets or reason in PROMISES or not len(blocks):
            return blocks
        promised = group.directory.refs[blocks] > 0
        cache = np.flatnonzero(self.may_write(group, blocks) & ~promised)[: self._num_allowed(group.cold_bytes)]
        kept = blocks[np.sort(np.concatenate([cache, np.flatnonzero(promised)]))]
        if len(kept) < len(blocks):
            group.counters.add("refused_blocks", len(blocks) - len(kept), tier="nvme", reason="budget")
        return kept

    def wrote(self, nbytes: int) -> None:
        """So much went to the disk, whatever for."""
        now_s = self._clock()
        for bucket, _ in self._buckets:
            bucket.take(nbytes, now_s)

    def _level(self) -> float:
        """Of what may be saved up, the share that is left of the scarcest budget."""
        now_s = self._clock()
        return min((bucket.level(now_s) / saved for bucket, saved in self._buckets), default=1.0)

    def _num_allowed(self, size: int) -> int:
        now_s = self._clock()
        return min(bucket.num_allowed(size, now_s) for bucket, _ in self._buckets)
