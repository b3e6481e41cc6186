"""How far the one bit "nobody goes on from here" can be read from what a pager sees: the best rule of its kind, in hindsight.

Requests are sorted into cells by what is known when they end: turns so far, length of prompt and answer, last think time. Of
each cell the trace itself says how many were gone on from, a coarser cell where it has few. A rule releases all whose
cell is below a share. Fitted to the very trace that it is judged on, so no rule on these cells that was learned before
can do better; it bounds release rules, not every use that could be made of the same knowledge.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count

import numpy as np

from ...pager.policies.base import FloatArray, IntArray
from ...pager.policies.registry import Setting, make_policy
from ...pager.policies.reuse import half_octave
from .oracles import NEVER
from .simulate import simulate
from .trace import Trace

SHARES = (0.2, 0.25, 0.3, 0.4, 0.5)  # that are tried
_FEW = 30  # requests in a cell


def best_release_rule(trace: Trace, capacity: int, goes_on: FloatArray) -> float:
    """The token hit rate of LRU with the best of these rules; `goes_on` of `shares_of`."""

    def rate(share: float) -> float:
        freed = [chain if low else chain[:0] for chain, low in zip(trace.chains, goes_on < share, strict=True)]
        policy = make_policy("lru", Setting(capacity, trace.block_tokens))
        return simulate(trace, policy, capacity, releases=freed).token_hit_rate(trace)

    return max(map(rate, SHARES))


def shares_of(trace: Trace, uses: list[IntArray]) -> FloatArray:
    """Per request the share of its cell that was gone on from; `uses` of `oracles.next_uses`."""
    was = np.array([_is_used(trace, number, use) for number, use in enumerate(uses)], float)
    seen = _seen(trace)
    found = np.full(len(was), was.mean() if len(was) else 0.0)
    for level in range(4):  # the finest cell with enough in it counts
        ids: dict[Hashable, int] = {}
        numbers = count()
        cells = np.array([ids.setdefault(_cell(one, level), next(numbers)) for one in seen], np.int64)
        cells = np.unique(cells, return_inverse=True)[1]
        size = np.bincount(cells)
        share = np.bincount(cells, weights=was) / size
        found = np.where(size[cells] >= _FEW, share[cells], found)
    return found


def _is_used(trace: Trace, number: int, use: IntArray) -> bool:
    """Whether the end of this chain (but for a block that is not full) was used again."""
    last = len(use) - 1 - (trace.requests[number].has_partial_tail and len(use) > 1)
    return bool(len(use)) and use[last] != NEVER


def _seen(trace: Trace) -> list[tuple[int, int, int, int]]:
    """Per request, by half powers of two: turns, prompt, answer, think time before it."""
    ends: dict[int, tuple[int, float]] = {}  # last full block -> turns and time
    found = []
    for chain, one in zip(trace.chains, trace.requests, strict=True):
        turn, gap_s = 0, -1.0
        before = next((block for block in chain[::-1].tolist() if block in ends), None)
        if before is not None:
            turns, at_s = ends.pop(before)
            turn, gap_s = turns + 1, one.now_s - at_s
        if len(chain):
            ends[int(chain[-2] if one.has_partial_tail and len(chain) > 1 else chain[-1])] = turn, one.now_s
        found.append((min(turn, 5), half_octave(one.input_tokens), half_octave(one.output_tokens), half_octave(gap_s)))
    return found


def _cell(seen: tuple[int, int, int, int], level: int) -> Hashable:
    turn, prompt, answer, gap = seen
    return ((turn,), (turn, prompt // 2), (turn, prompt // 2, answer // 2), (turn, prompt, answer // 2, gap // 2))[
        level
    ]
