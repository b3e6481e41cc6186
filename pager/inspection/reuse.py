"""Reuse distances of blocks, from a sample of their keys: what would more memory have hit?

A key is in the sample when its tag is below a threshold, so every use of a sampled block is seen and distances among the
sample, divided by its rate, are distances among all blocks. The sample is bounded: when it is full the threshold halves
and what is above it is forgotten. A block counts once per request. No key is kept, only tags. The latest uses are also kept in
order, so that any policy can be tried on them, in a memory that is smaller by the sample's rate.
Source: SHARDS (Waldspurger et al., FAST 2015); Cache Modeling and Optimization using Miniature Simulations (same, ATC 2017).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_SAMPLED = 4096
MAX_LOGGED = 1 << 13  # uses that are kept in order
_SPAN = 1 << 32  # of tags
BINS_PER_OCTAVE = 8
_PIECE = 4096  # of a request at once: so many may be in the sample beyond its bound for a moment
_NUM_BINS = 48 * BINS_PER_OCTAVE


@dataclass(frozen=True, slots=True)
class Use:
    """Of one request: when, how many blocks it used in all, and those that were sampled."""

    time_s: float
    blocks: int
    tags: npt.NDArray[np.uint32]


class ReuseSampler:
    """Histogram of reuse distances in blocks; bin b holds distances up to 2 ** (b / BINS_PER_OCTAVE)."""

    def __init__(self, max_sampled: int = MAX_SAMPLED) -> None:
        self._max, self._threshold = max_sampled, _SPAN
        self._last: dict[int, int] = {}  # tag -> time of its last use
        self._times = np.empty(0, np.int64)  # of all last uses, ascending
        self._now = 0
        self._bins = np.zeros(_NUM_BINS)
        self._first_uses = 0.0
        self._log: deque[Use] = deque()
        self._num_logged = 0

    @property
    def rate(self) -> float:
        """Share of all keys that are sampled."""
        return self._threshold / _SPAN

    def used(self, tags: npt.NDArray[np.uint32], now_s: float = 0.0) -> None:
        """The blocks of one request, in order. Cost: array code per run of blocks that were last used in this order."""
        for start in range(0, len(tags), _PIECE):
            piece = tags[start : start + _PIECE]
            sampled = list(dict.fromkeys(piece[piece < self._threshold].tolist()))
            lasts = np.fromiter(map(self._last.get, sampled, repeat(0)), np.int64, len(sampled))
            first = 0
            for end in (*_run_ends(lasts).tolist(), len(sampled)):
                self._use(sampled[first:end], lasts[first:end])
                first = end
            while len(self._last) > self._max:
                self._halve()
        self._keep(tags, now_s)

    def logged(self) -> list[Use]:
        """The latest requests, oldest first, with what the present sample has of them."""
        uses = (Use(use.time_s, use.blocks, use.tags[use.tags < self._threshold]) for use in self._log)
        return [use for use in uses if len(use.tags)]

    def _keep(self, tags: npt.NDArray[np.uint32], now_s: float) -> None:
        """Log a request by its sampled blocks; the oldest go when there are too many."""
        sampled = tags[tags < self._threshold][:MAX_LOGGED].copy()
        if len(sampled):
            self._log.append(Use(now_s, len(tags), sampled))
            self._num_logged += len(sampled)
        while self._num_logged > MAX_LOGGED:
            self._num_logged -= len(self._log.popleft().tags)

    def _use(self, tags: list[int], lasts: npt.NDArray[np.int64]) -> None:
        """Blocks whose last uses, where they had any (else 0), are in this order: each passes all those before it."""
        weight, places = 1.0 / self.rate, np.flatnonzero(lasts)
        at = np.searchsorted(self._times, lasts[places], "right")
        distances = (len(self._times) - at + 1 + places) / self.rate
        bins = np.ceil(np.log2(distances) * BINS_PER_OCTAVE).astype(np.int64)
        np.add.at(self._bins, np.minimum(_NUM_BINS - 1, bins), weight)
        self._first_uses += weight * (len(tags) - len(places))
        now = np.arange(self._now + 1, self._now + 1 + len(tags))
        self._now += len(tags)
        self._times = np.concatenate([np.delete(self._times, at - 1), now])
        self._last.update(zip(tags, now.tolist(), strict=True))

    def _halve(self) -> None:
        self._threshold //= 2
        self._last = {tag: time for tag, time in self._last.items() if tag < self._threshold}
        self._times = np.sort(np.fromiter(self._last.values(), np.int64, len(self._last)))

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


def _run_ends(lasts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where a last use is earlier than the one before it; first uses (0) fit into any run."""
    places = np.flatnonzero(lasts)
    return places[1:][np.diff(lasts[places]) < 0]
