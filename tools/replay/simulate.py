"""One trace through one tier of one size under one policy: which prefix of each request is a hit.

The driver stands where the pager's group stands: it knows what is held and evicts what the policy names. A request hits
the longest prefix of its chain that is held; then its whole chain is held, and what is too much leaves. Requests do not
overlap and nothing is pinned. Time is the trace's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...pager.policies.base import IntArray, Policy
from .trace import Trace


@dataclass(frozen=True, slots=True)
class Outcome:
    """Per request the blocks that hit; over all, blocks written and evicted."""

    hit_blocks: IntArray
    written_blocks: int
    evicted_blocks: int

    def hit_tokens(self, trace: Trace) -> IntArray:
        tokens = np.array([one.input_tokens for one in trace.requests], np.int64)
        return np.minimum(self.hit_blocks * trace.block_tokens, tokens)

    def token_hit_rate(self, trace: Trace) -> float:
        return float(self.hit_tokens(trace).sum()) / max(1, trace.total_tokens)


def simulate(
    trace: Trace,
    policy: Policy,
    capacity: int,
    *,
    releases: list[IntArray] | None = None,
    on_request: Callable[[int], None] | None = None,
) -> Outcome:
    """`releases` are, per request, blocks that somebody says will not be used again, told when it ends."""
    held = np.zeros(trace.num_blocks, bool)
    policy.grow(trace.num_blocks)
    hit_blocks = np.zeros(len(trace.chains), np.int64)
    used = written = evicted = 0
    for number, chain in enumerate(trace.chains):
        if on_request is not None and not number & 255:
            on_request(number)
        if not len(chain):
            continue
        was_held = held[chain]
        hit_blocks[number] = first_missing(was_held)
        new = len(chain) - int(np.count_nonzero(was_held))
        policy.on_chain(chain, was_held, trace.requests[number])
        if releases is not None and len(releases[number]):
            policy.on_release(releases[number])
        if new:
            held[chain] = True
            used += new
            written += new
            if used > capacity:
                leaving = policy.coldest(used - capacity)
                policy.on_evict(leaving)
                held[leaving] = False
                used -= len(leaving)
                evicted += len(leaving)
    return Outcome(hit_blocks, written, evicted)


def first_missing(held: npt.NDArray[np.bool_]) -> int:
    first = int(held.argmin())
    return first if not held[first] else len(held)
