"""Siblings: blocks that lie next to those that somebody waits for in a segment, continue the same chain, and that somebody
refers to. A read of small blocks costs by the request, so they come along in the same one, as prefetches.

A chain's blocks are written in a row, and who waits for some of them often waits for a few at a time: a client of a daemon has
only so many leases, a lease only so much room. Free host slots are taken, nobody's cache. Guards: what is asked for is read
first of all that a call of ours reads; a sibling is never more than half of the room that is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import fetched
from .states import NOWHERE, IntArray

if TYPE_CHECKING:
    from .group import BlockGroup

MAX_READ_BYTES = 1 << 20  # of a read with its siblings: blocks as large as that gain nothing by sharing a request


def read_along(group: BlockGroup, blocks: IntArray, slots: IntArray, asker: int | None) -> None:
    """Nvme -> host for blocks that somebody waits for, into host slots that were taken for them; siblings come along."""
    assert group.cold is not None
    if _may_take_more(group, blocks, slots, asker):
        room = (group.host.num_free - len(slots)) // 2
        more = _siblings(group, blocks)[:room]
        if len(more):
            slots = group.host.take_free(len(blocks) + len(more))  # those taken are free until they are staged
            both = np.concatenate([blocks, more])
            blocks = both[np.argsort(group.directory.nvme_slot[both], kind="stable")]
            fetched.started(group, more, "host")
    group.cold.read(blocks, slots, "demand")


def _may_take_more(group: BlockGroup, blocks: IntArray, slots: IntArray, asker: int | None) -> bool:
    return (
        group.cold is not None
        and group.cold.ring is not None  # a daemon's clients ask it, and it brings them along
        and len(slots) == len(blocks)  # of packed slots some blocks take several
        and len(blocks) * group.cold_bytes < MAX_READ_BYTES
        and group.quotas.room(group, "host", asker) is None
    )


def _siblings(group: BlockGroup, blocks: IntArray) -> IntArray:
    """From each block on, slot by slot, after it and before it. Cost: of the blocks and of what is found, not of all."""
    assert group.cold is not None and group.cold.ring is not None
    d, ring, room = group.directory, group.cold.ring, MAX_READ_BYTES // group.cold_bytes - len(blocks)
    size = ring.geometry(group.index).slots_per_segment
    seen, found = set(blocks.tolist()), list[int]()
    for step in (1, -1):
        ends = blocks
        while len(ends) and len(found) < room:
            slots = d.nvme_slot[ends] + step
            others = d.find(ring.keys_at(group.index, slots))
            fits = (others >= 0) & (slots // size == (slots - step) // size)
            ends, slots, others = ends[fits], slots[fits], others[fits]
            fits = (d.nvme_slot[others] == slots) & d.nvme_valid[others] & (d.refs[others] > 0)
            fits &= (d.host_slot[others] == NOWHERE) & (d.page[others] == NOWHERE)
            new = list[int]()
            for end, other in zip(ends[fits].tolist(), others[fits].tolist(), strict=True):
                parent, child = (end, other) if step > 0 else (other, end)
                if other not in seen and d.parent[child] == d.key[parent]:
                    new.append(other)
            seen.update(new)
            found += new
            ends = np.array(new, np.int64)
    return np.array(found[:room], np.int64)
