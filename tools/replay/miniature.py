"""Miniature simulation: a sample of blocks through a memory that is smaller by the sample's rate hits what all would hit.

The sample is what a pager hands to those who ask it for advice: requests in order, each with the numbers of its sampled
blocks. A hit is a block of the longest prefix that is held, as in any other replay here.
Source: Waldspurger et al., Cache Modeling and Optimization using Miniature Simulations (ATC 2017).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...pager.policies.registry import Setting, make_policy
from .simulate import simulate
from .trace import Recorded, Trace, trace_of

WARM_UP = 0.25  # of the sample only fills the memory


def trace_of_sample(sample: Iterable[Mapping[str, Any]], block_tokens: int) -> Trace:
    """`sample`: per request `time_s` and `ids`."""
    lines = [Recorded(1e3 * use["time_s"], tuple(use["ids"]), -1, 0, False) for use in sample]
    return trace_of("sample", lines, block_tokens)


def hit_rate(trace: Trace, policy: str, blocks: int) -> float:
    """Share of the blocks of all but the first requests. Raises: ConfigError for a policy that is unknown."""
    hits = simulate(trace, make_policy(policy, Setting(blocks, trace.block_tokens)), blocks).hit_blocks
    first = int(WARM_UP * len(hits))
    return float(hits[first:].sum() / max(1, sum(map(len, trace.chains[first:]))))
