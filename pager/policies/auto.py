"""Our own rule: who is least likely to be used again soon, per block and second, leaves first; where that is no better
than recency, who was used longest ago.

It learns online, from what a pager sees: how often a chain was continued, how long its prompts are and, in a replay alone,
its answers (a pager tells no policy), how long its user thought, where chains part. `reuse` holds what is learned, `segments`
what chains there are, `shelf` what an order keeps of them: one shelf is what is held, the other a shadow of what the other
order would hold. The order whose shelf saves more is in force; recency is until the other one has proven itself.

State is per segment of a chain, so the work per request does not grow with its blocks. Before either order come released
blocks, and ends of prompts that fill no block (only the same prompt again could use one).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import islice

import numpy as np

from .base import _FIRST_SIZE, NOWHERE, UNKNOWN, BoolArray, FloatArray, IntArray, Policy, Request, resized
from .reuse import (
    AGE_ENDS_S,
    LEFTOVER,
    NUM_AGES,
    NUM_FEATURES,
    RISKS,
    LifeTable,
    Risk,
    age_bin,
    age_bins,
    features_of,
    kind_of,
)
from .segments import Segments
from .shelf import Order, Shelf

_SWEEP_EVERY, _UPDATE_EVERY = 64, 256  # requests
_WEIGHT_FADE = 0.9  # of what each order saved, per update
_SPARE_SEGMENTS = 4096  # without blocks, before they are dropped
_CLEARLY = 1.02  # times as much saved: then the other order comes into force


class ByRecency:
    """Who was used longest ago leaves first."""

    name = "recency"
    is_fading = False

    def __init__(self, segments: Segments) -> None:
        self._segments = segments

    def score(self, segment: int) -> float:
        return float(self._segments.time_s[segment])

    def scores(self, segments: IntArray) -> FloatArray:
        return self._segments.time_s[segments]

    def scores_of_times(self, used_s: FloatArray) -> FloatArray:
        return used_s


class ByDensity:
    """Who has the least chance of use per second held leaves first. A common beginning has its rate of use."""

    name = "density"
    is_fading = True

    def __init__(self, segments: Segments, table: LifeTable) -> None:
        self._segments, self._table = segments, table
        self.now_s = 0.0

    def score(self, segment: int) -> float:
        segments = self._segments
        age_s = self.now_s - float(segments.time_s[segment])
        if segments.is_common[segment]:
            return 1.0 / max(float(segments.gap_s[segment]), age_s, 1e-3)
        return float(self._table.density[segments.kind[segment], age_bin(age_s)])

    def scores(self, segments: IntArray) -> FloatArray:
        of = self._segments
        age_s = self.now_s - of.time_s[segments]
        density: FloatArray = self._table.density[of.kind[segments], age_bins(age_s)]
        common = of.is_common[segments]
        if common.any():
            rate = 1.0 / np.maximum(np.maximum(of.gap_s[segments], age_s), 1e-3)
            density = np.where(common, rate, density)
        return density

    def scores_of_times(self, used_s: FloatArray) -> FloatArray:
        density: FloatArray = self._table.density[
            RISKS // 2, age_bins(self.now_s - used_s)
        ]  # as of an average first turn
        return density


class Auto(Policy):
    """In a replay whole requests are told (`on_chain`), with the trace's times, and `coldest` is what is held.

    A pager at work gives a `clock`. It tells prefixes that were found (`on_hit`), steps with all blocks that they read
    (`on_access`) and new blocks. What it found, and what a further turn of an open sequence has already, is a request; a chain
    that no request began with, begins with its first step. Steps count nothing, however long they take. It asks `victims`
    among blocks of its own choosing, so here both shelves are shadows.
    """

    name = "auto"

    def __init__(self, capacity: int, clock: Callable[[], float] | None = None, block_size: int = 1) -> None:
        super().__init__(capacity)
        self._clock, self._block_size = clock, block_size
        self._is_released = np.zeros(_FIRST_SIZE, bool)  # only with a clock
        self._used_s = np.zeros(_FIRST_SIZE)  # of blocks whose chain was not told; only with a clock
        self._most_segments = _SPARE_SEGMENTS
        self._segments, self._table, self._risk = Segments(), LifeTable(), Risk(NUM_FEATURES)
        self._by_density = ByDensity(self._segments, self._table)
        self._held = Shelf(self._segments, ByRecency(self._segments), self.capacity)
        self._shadow = Shelf(self._segments, self._by_density, self.capacity)
        self._saved = [0.0, 0.0]  # blocks, by the held shelf and by its shadow
        self._features: dict[int, tuple[Hashable, ...]] = {}  # of open segments
        self._swept = np.zeros(NUM_AGES, np.int64)  # per age the first segment that has not reached it
        self._judged = 0
        self._patience_s = 300.0  # after which a chain counts as not used again: what 95 in 100 gaps are shorter than
        self._gaps: list[float] = []
        self._now_s = 0.0
        self._requests = 0
        self._tails: dict[int, int] = {}  # of segments
        self._released: dict[int, None] = {}  # blocks, in order

    @property
    def order(self) -> Order:
        """The order in force."""
        return self._held.order

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        self._segments.grow(num_ids)
        if num_ids > len(self._is_released):
            self._is_released = resized(self._is_released, len(self.depth), 0)
            self._used_s = resized(self._used_s, len(self.depth), 0)

    # ------------------------------------------------------------------ what happened
    def on_chain(self, chain: IntArray, held: BoolArray, request: Request = UNKNOWN) -> None:
        segments, self._now_s = self._segments, request.now_s
        self._by_density.now_s = request.now_s
        for block in chain.tolist() if self._released else ():
            self._released.pop(block, None)  # used after all
        runs = segments.runs_of(chain)
        for index, shelf in enumerate((self._held, self._shadow)):
            self._saved[index] += shelf.hit(runs)
            shelf.leave(runs)
        joint = segments.take_over(chain, runs, request.now_s)
        turn, gap_s = 0, -1.0
        if joint.parent != NOWHERE:
            turn, gap_s = int(segments.turn[joint.parent]) + 1, request.now_s - float(segments.time_s[joint.parent])
            self._note_use(joint.parent)
        for number in range(joint.first_new, segments.count):  # a common beginning has come to be
            self._place(number, len(segments.chain[number]))
        if joint.start < len(chain):
            self._open(chain, joint.start, turn, gap_s, request)
        self._shadow.trim()
        if self._clock is not None:
            self._held.trim()
        self._requests += 1
        if not self._requests % _SWEEP_EVERY:
            self._sweep()

    def _open(self, chain: IntArray, start: int, turn: int, gap_s: float, request: Request) -> None:
        segments = self._segments
        number = segments.open(chain, start, request.now_s)
        features = features_of(turn, gap_s, request)
        segments.turn[number] = turn
        segments.kind[number] = kind_of(turn, self._risk.of(features))
        segments.is_open[number] = True
        self._features[number] = features
        has_tail = request.has_partial_tail and len(chain) - start > 1
        if has_tail:
            self._tails[number] = int(chain[-1])
        self._place(number, len(chain) - has_tail)

    def _place(self, number: int, high: int) -> None:
        self._held.add(number, high)
        self._shadow.add(number, high)

    def _note_use(self, parent: int) -> None:
        segments = self._segments
        if segments.is_open[parent]:
            age_s = self._now_s - float(segments.time_s[parent])
            bin = age_bin(age_s)
            self._table.note_use(int(segments.kind[parent]), bin)
            segments.is_open[parent] = False
            features = self._features.pop(parent, None)
            if features is not None:
                self._risk.learn(features, True, float(self._table.cumulative[bin]))
            self._gaps.append(age_s)
        segments.kind[parent] = LEFTOVER

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        """Just written: the next access tells whose they are."""
        self.depth[blocks] = depth
        self._is_released[blocks] = False
        self._used_s[blocks] = self._clock() if self._clock is not None else 0.0

    def on_hit(self, blocks: IntArray) -> None:
        if len(blocks) and self._clock is not None and not self.depth[blocks[0]]:  # a chain from its root
            self._is_released[blocks] = False
            self._request(blocks)

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        if not len(blocks) or self._clock is None:
            return
        segments, now_s = self._segments, self._clock()
        self._is_released[blocks] = False
        if (
            self.depth[blocks[0]] or self.depth[blocks[-1]] != len(blocks) - 1
        ):  # not a chain from its root: nothing to learn, only used now
            owners = segments.of_block[blocks]
            segments.time_s[owners[owners >= 0]] = self._used_s[blocks] = now_s
            return
        runs = segments.runs_of(blocks)
        last = runs[-1][0] if runs else NOWHERE
        if last == NOWHERE:
            self._request(blocks)
            return
        for segment, _, _ in runs:
            segments.time_s[segment] = now_s
        known = runs[-1][2]
        if known == len(blocks):
            return
        if segments.is_common[last]:  # its request was told with what it found, these are its own
            self._now_s = self._by_density.now_s = now_s
            self._open(blocks.copy(), known, 0, -1.0, self._told(len(blocks)))
        elif segments.size[last] == known:
            segments.extend(last, blocks, known)
            for shelf in (self._held, self._shadow):
                shelf.extend(last, len(blocks) - known)
        for shelf in (self._held, self._shadow):
            shelf.trim()

    def _request(self, chain: IntArray) -> None:
        self.on_chain(chain.copy(), np.ones(len(chain), bool), self._told(len(chain)))

    def _told(self, num_blocks: int) -> Request:
        assert self._clock is not None
        return Request(self._clock(), num_blocks * self._block_size, 0)

    def on_forget(self, blocks: IntArray) -> None:
        self._segments.forget(blocks)
        self._is_released[blocks] = False

    def on_evict(self, blocks: IntArray) -> None:
        """Nothing to do: `coldest` has taken them out, and what is known of a chain outlives its blocks."""

    def on_release(self, blocks: IntArray) -> None:
        segments = self._segments
        if self._clock is not None:
            self._is_released[blocks] = True
            return
        for number in np.unique(segments.of_block[blocks]).tolist():
            if number == NOWHERE:
                continue
            low = int(segments.low[number])
            cut = low + int(np.isin(segments.chain[number][low:], blocks).argmax())
            high = int(self._held.high[number])
            self._released |= dict.fromkeys(segments.chain[number][cut:high][::-1].tolist())
            for shelf in (self._held, self._shadow):
                if shelf.high[number] > cut:
                    shelf.cut(number, cut)
            tail = self._tails.pop(number, NOWHERE)
            if tail != NOWHERE and segments.of_block[tail] == number:
                self._released[tail] = None

    # ------------------------------------------------------------------ who should leave
    def coldest(self, n: int) -> IntArray:
        first = np.array(self._first_to_leave(n), np.int64)
        given = self._held.give_up(n - len(first))
        parts = [first, *(self._segments.chain[number][cut:high][::-1] for number, cut, high in given)]
        return np.concatenate(parts)

    def _first_to_leave(self, n: int) -> list[int]:
        """Released blocks, then ends of prompts."""
        leaving = list(islice(self._released, n))
        for block in leaving:
            del self._released[block]
        while len(leaving) < n and self._tails:
            number = next(iter(self._tails))
            tail = self._tails.pop(number)
            if self._segments.of_block[tail] == number:
                leaving.append(tail)
        return leaving

    def rank(self, blocks: IntArray) -> FloatArray:
        """Of blocks of one segment the deepest leaves first; `victims` sees to it."""
        self._by_density.now_s = self._clock() if self._clock is not None else self._now_s
        owners = self._segments.of_block[blocks]
        rank = self.order.scores(np.maximum(owners, 0))
        unknown = owners < 0
        rank[unknown] = self.order.scores_of_times(self._used_s[blocks[unknown]])
        rank[self._is_released[blocks]] = -1.0
        return rank

    def victims(self, n: int, candidates: IntArray) -> IntArray:
        if n <= 0 or not len(candidates):
            return candidates[:0]
        rank = self.rank(candidates)
        if n < len(candidates):  # of one segment all rank alike: those at the edge come along, and depth decides
            near = np.flatnonzero(rank <= np.partition(rank, n - 1)[n - 1])
            candidates, rank = candidates[near], rank[near]
        return candidates[np.lexsort((-self.depth[candidates], rank))[:n]]

    # ------------------------------------------------------------------ learning
    def _sweep(self) -> None:
        """Count the chains that grew older without being used, and learn from those that are past hope."""
        segments = self._segments
        starts_s = segments.start_s[: segments.count]
        stops = np.searchsorted(starts_s, self._now_s - AGE_ENDS_S, side="right")
        for age in np.flatnonzero(stops > self._swept).tolist():
            passed = slice(int(self._swept[age]), int(stops[age]))
            self._table.note_alive(segments.kind[passed][segments.is_open[passed]], age)
        self._swept = np.maximum(stops, self._swept)
        past_hope = int(np.searchsorted(starts_s, self._now_s - self._patience_s, side="right"))
        hazard = float(self._table.cumulative[age_bin(self._patience_s)])
        for number in range(self._judged, past_hope):
            features = self._features.pop(number, None)
            if features is not None:
                self._risk.learn(features, False, hazard)
        self._judged = max(self._judged, past_hope)
        if not self._requests % _UPDATE_EVERY:
            self._table.update()
            self._choose_order()
            if self._clock is not None and self._segments.count > self._most_segments:
                self._drop_dead()
            self._gaps = self._gaps[-2000:]
            if self._gaps:
                self._patience_s = float(np.percentile(self._gaps, 95))

    def _drop_dead(self) -> None:
        """Forget segments that have no block any more, once they were counted as not used again."""
        segments = self._segments
        is_kept = segments.is_open[: segments.count] & (
            segments.start_s[: segments.count] > self._now_s - self._patience_s
        )
        is_kept[segments.of_block[segments.of_block >= 0]] = True
        kept = np.flatnonzero(is_kept)
        self._swept = np.searchsorted(kept, self._swept)
        self._judged = int(np.searchsorted(kept, self._judged))
        self._features = {new: self._features[old] for new, old in enumerate(kept.tolist()) if old in self._features}
        segments.keep(kept)
        for shelf in (self._held, self._shadow):
            shelf.keep(kept)
        self._most_segments = 2 * len(kept) + _SPARE_SEGMENTS

    def _choose_order(self) -> None:
        held, shadow = self._saved
        if shadow > _CLEARLY * held:
            order = self._held.order
            self._held, self._shadow = self._held.copy(self._shadow.order), self._held.copy(order)
            self._saved = [shadow, held]
        self._saved = [_WEIGHT_FADE * saved for saved in self._saved]
