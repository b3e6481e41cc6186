"""Advice completed by who asks: other policies tried on the pager's sample, in a memory smaller by the sample's rate.

The pager hands out the latest uses of its sampled blocks and spends nothing on this; numpy and the policies are imported
here, when somebody wants advice. A hit is a block of the longest prefix that is held, as for the pager itself.
Source: Waldspurger et al., Cache Modeling and Optimization using Miniature Simulations (ATC 2017).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...pager.inspection.asking import Target

POLICIES = ("auto", "lru", "fifo", "lfu", "slru")  # that a pager takes and that need no further setting
MIN_BLOCKS = 32  # of the small memory; below, one block more or less decides


def advised(target: Target, **given: Any) -> dict[str, Any]:
    """The pager's advice, with hit rates by policy for the size now and the size that was asked about."""
    told = target.ask("advise", **given)
    sample, wanted = told.pop("sample", []), {1.0, told.get("factor", 2.0)}
    for row in told["rows"]:
        row["policies"] = {}
    if not sample:
        return told
    from ..replay.miniature import hit_rate, trace_of_sample

    trace = trace_of_sample(sample, told["block_size"])
    for row in told["rows"]:
        blocks = round(row["blocks"] * told["sample_rate"])
        if row["factor"] in wanted and blocks >= MIN_BLOCKS:
            row["policies"] = {name: hit_rate(trace, name, blocks) for name in POLICIES}
    return told | {"sampled_requests": len(sample)}
