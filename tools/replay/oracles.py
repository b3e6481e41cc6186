"""What could be had with knowledge of the future: bounds, never policies.

`belady` is the optimum in blocks, of one size: whoever is used again last leaves first, the deepest of equals; a block
that would leave at once is not taken in. Each use of a block uses its ancestors, so this keeps prefixes whole, which
makes it the true bound of blocks. In tokens another choice can hit more where the last blocks of prompts are nearly empty,
for these count as much as full ones. `releases` is one perfect bit per block and request: no later request uses it.
Source: Belady (IBM Systems Journal 5(2), 1966); Mattson and others (1970) for the proof.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np

from ...pager.policies.base import IntArray
from .simulate import first_missing
from .trace import Trace

NEVER = np.iinfo(np.int64).max


def next_uses(trace: Trace) -> list[IntArray]:
    """Per request and block of its chain: the number of the next request that uses it."""
    last = np.full(trace.num_blocks, NEVER)
    found: list[IntArray] = []
    for number in range(len(trace.chains) - 1, -1, -1):
        chain = trace.chains[number]
        found.append(last[chain])
        last[chain] = number
    return found[::-1]


def releases(trace: Trace, uses: list[IntArray] | None = None) -> list[IntArray]:
    uses = next_uses(trace) if uses is None else uses
    return [chain[use == NEVER] for chain, use in zip(trace.chains, uses, strict=True)]


def belady(trace: Trace, capacity: int, uses: list[IntArray] | None = None) -> IntArray:
    """Blocks that each request hits. Work is by runs of a chain with one next use, which are held whole or from the front."""
    uses = next_uses(trace) if uses is None else uses
    next_use = np.full(trace.num_blocks, -1)  # of held blocks
    heap: list[
        tuple[int, int, int, int]
    ] = []  # latest use first, then deepest: request that brought it, end of the run
    hit_blocks, used = np.zeros(len(trace.chains), np.int64), 0
    for number, (chain, use) in enumerate(zip(trace.chains, uses, strict=True)):
        if not len(chain):
            continue
        held = next_use[chain] == number
        hit_blocks[number] = first_missing(held)
        wanted = use != NEVER
        used += int(np.count_nonzero(wanted)) - int(np.count_nonzero(held))
        next_use[chain] = np.where(wanted, use, -1)
        edges = [0, *((use[1:] != use[:-1]).nonzero()[0] + 1).tolist(), len(chain)]
        for begin, end in pairwise(edges):
            if wanted[begin]:
                heapq.heappush(heap, (-int(use[begin]), -begin, number, end))
        while used > capacity:
            late, start, bringer, end = heapq.heappop(heap)
            begin = max(-start, end - (used - capacity))
            next_use[trace.chains[bringer][begin:end]] = -1
            used -= end - begin
            if begin > -start:
                heapq.heappush(heap, (late, start, bringer, begin))
    return hit_blocks
