"""Who leaves a tier first. Pure bookkeeping on arrays: same calls, same answers; the pager evicts, a policy only names.

Both policies keep chains whole from the front: within one access, a later block of the chain goes before an earlier
one, because a prefix is useful without its end and never the other way round.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..tiers.errors import ConfigError
from .states import IntArray

RELEASED = 0  # recency of blocks whose owner said that they will not be used again
_DEPTH_BITS = 24  # chains of up to 16.7 M blocks; recency takes the bits above


class Policy(Protocol):
    """Order of leaving one tier. Blocks are directory ids."""

    def on_insert(self, blocks: IntArray, tick: int, depth: IntArray) -> None: ...

    def on_access(self, blocks: IntArray, tick: int, distance_tokens: IntArray | None = None) -> None:
        """A step used these blocks; `distance_tokens` is how far each lies behind the newest token."""

    def on_release(self, blocks: IntArray) -> None:
        """Nobody will ask for these again: they leave first."""

    def on_evict(self, blocks: IntArray) -> None: ...

    def victims(self, n: int, candidates: IntArray) -> IntArray:
        """Up to n of the candidates, first to leave first. Changes nothing."""


class LruPolicy:
    """Least recently used; ties (one access touches a whole chain) leave from the chain's end."""

    name = "lru"

    def __init__(self) -> None:
        self._tick = np.zeros(1024, np.int64)
        self._depth = np.zeros(1024, np.int64)

    def on_insert(self, blocks: IntArray, tick: int, depth: IntArray) -> None:
        if len(blocks):
            self._grow(int(blocks.max()) + 1)
            self._tick[blocks] = tick
            self._depth[blocks] = depth

    def on_access(self, blocks: IntArray, tick: int, distance_tokens: IntArray | None = None) -> None:
        self._tick[blocks] = tick

    def on_release(self, blocks: IntArray) -> None:
        self._tick[blocks] = RELEASED

    def on_evict(self, blocks: IntArray) -> None:
        pass

    def victims(self, n: int, candidates: IntArray) -> IntArray:
        return _lowest(n, candidates, self._rank(candidates))

    def _rank(self, blocks: IntArray) -> IntArray:
        return (self._tick[blocks] << _DEPTH_BITS) - self._depth[blocks]

    def _grow(self, need: int) -> None:
        if need > len(self._tick):
            size = max(need, 2 * len(self._tick))
            self._tick = np.resize(self._tick, size)
            self._depth = np.resize(self._depth, size)


class SlidingWindowPolicy(LruPolicy):
    """Blocks outside the last `window` tokens leave first, the first `sinks` tokens last, LRU within each class.

    Source: attention sinks, StreamingLLM (arXiv 2309.17453): the first tokens draw attention mass at any length, so
    they are the worst blocks to lose; everything between them and the window is the best.
    """

    name = "sliding_window"

    def __init__(self, window_tokens: int, sink_tokens: int, block_size: int) -> None:
        super().__init__()
        if window_tokens < 1:
            raise ConfigError(f"window={window_tokens}: the sliding_window policy needs a window of at least 1 token")
        self._window = window_tokens
        self._sink_blocks = -(-sink_tokens // block_size)
        self._class = np.zeros(1024, np.int64)  # 0 outside, 1 in the window, 2 sink

    def on_insert(self, blocks: IntArray, tick: int, depth: IntArray) -> None:
        super().on_insert(blocks, tick, depth)
        self._class[blocks] = np.where(depth < self._sink_blocks, 2, 1)

    def on_access(self, blocks: IntArray, tick: int, distance_tokens: IntArray | None = None) -> None:
        super().on_access(blocks, tick)
        if distance_tokens is not None:
            sink = self._depth[blocks] < self._sink_blocks
            self._class[blocks] = np.where(sink, 2, np.where(distance_tokens < self._window, 1, 0))

    def on_release(self, blocks: IntArray) -> None:
        super().on_release(blocks)
        self._class[blocks] = 0

    def victims(self, n: int, candidates: IntArray) -> IntArray:
        return _lowest(n, candidates, (self._class[candidates] << 56) + self._rank(candidates))

    def _grow(self, need: int) -> None:
        super()._grow(need)
        if len(self._class) < len(self._tick):
            self._class = np.resize(self._class, len(self._tick))


def make_policy(name: str, *, window: int | None, sinks: int, block_size: int) -> LruPolicy:
    """The policy of that name. Raises ConfigError naming the known ones."""
    if name == "lru":
        return LruPolicy()
    if name == "sliding_window":
        if window is None:
            raise ConfigError("policy='sliding_window' needs window=<tokens> (and sinks=<tokens>, 4 is usual)")
        return SlidingWindowPolicy(window, sinks, block_size)
    raise ConfigError(f"policy={name!r} is unknown; choose lru or sliding_window")


def _lowest(n: int, candidates: IntArray, rank: IntArray) -> IntArray:
    if n <= 0 or not len(candidates):
        return candidates[:0]
    if n < len(candidates):
        chosen = np.argpartition(rank, n - 1)[:n]
    else:
        chosen = np.arange(len(candidates))
    return candidates[chosen[np.argsort(rank[chosen], kind="stable")]]
