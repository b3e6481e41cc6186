"""Reuse distances of blocks, from a sample of their keys: what would more memory have hit?

A key is in the sample when its tag is below a threshold, so every use of a sampled block is seen and distances among the
sample, divided by its rate, are distances among all blocks. The sample is bounded: when it is full the threshold halves
and what is above it is forgotten. A block counts once per request. No key is kept, only tags.
Source: SHARDS (Waldspurger et al., FAST 2015).
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_SAMPLED = 4096
_SPAN = 1 << 32  # of tags
BINS_PER_OCTAVE = 8
_NUM_BINS = 48 * BINS_PER_OCTAVE


class ReuseSampler:
    """Histogram of reuse distances in blocks; bin b holds distances up to 2 ** (b / BINS_PER_OCTAVE)."""

    def __init__(self, max_sampled: int = MAX_SAMPLED) -> None:
        self._max, self._threshold = max_sampled, _SPAN
        self._last: dict[int, int] = {}  # tag -> time of its last use
        self._times: list[int] = []  # of all last uses, ascending
        self._now = 0
        self._bins = np.zeros(_NUM_BINS)
        self._first_uses = 0.0

    @property
    def rate(self) -> float:
        """Share of all keys that are sampled."""
        return self._threshold / _SPAN

    def used(self, tags: npt.NDArray[np.uint32]) -> None:
        """The blocks of one request, in order."""
        for tag in tags[tags < self._threshold].tolist():  # the sample: a bounded share of the blocks
            self._use(tag)

    def _use(self, tag: int) -> None:
        last, weight = self._last.get(tag), 1.0 / self.rate
        if last is None:
            self._first_uses += weight
        else:
            at = bisect_right(self._times, last)
            distance = (len(self._times) - at + 1) / self.rate
            self._bins[min(_NUM_BINS - 1, int(np.ceil(np.log2(distance) * BINS_PER_OCTAVE)))] += weight
            del self._times[at - 1]
        self._now += 1
        self._last[tag] = self._now
        self._times.append(self._now)
        if len(self._last) > self._max:
            self._halve()

    def _halve(self) -> None:
        self._threshold //= 2
        self._last = {tag: time for tag, time in self._last.items() if tag < self._threshold}
        self._times = sorted(self._last.values())

    def hit_rate(self, num_blocks: float) -> float | None:
        """Share of block uses that a memory of so many blocks, least recently used first, would hit."""
        total = self._bins.sum() + self._first_uses
        if not total or num_blocks < 1:
            return 0.0 if total else None
        whole = int(np.floor(np.log2(num_blocks) * BINS_PER_OCTAVE))
        return float(self._bins[: whole + 1].sum() / total)

    def to_dict(self) -> dict[str, Any]:
        total = float(self._bins.sum() + self._first_uses)
        return {
            "uses": total,
            "sampled_blocks": len(self._last),
            "sample_rate": self.rate,
            "ever_reused": float(self._bins.sum() / total) if total else None,
        }
