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
    """Behind the last and before the first slot of each run. Cost: a pass over the directory, and a step per sibling."""
    assert group.cold is not None and group.cold.ring is not None
    d, room = group.directory, MAX_READ_BYTES // group.cold_bytes - len(blocks)
    size = group.cold.ring.geometry(group.index).slots_per_segment
    is_wanted = d.is_named & d.nvme_valid & (d.refs > 0) & (d.host_slot == NOWHERE) & (d.page == NOWHERE)
    is_wanted[blocks] = False
    wanted = np.flatnonzero(is_wanted)
    by_slot = dict(zip(d.nvme_slot[wanted].tolist(), wanted.tolist(), strict=True))
    found: list[int] = []
    for block in blocks.tolist() if by_slot else ():
        for step in (1, -1):
            last, slot = block, int(d.nvme_slot[block]) + step
            while len(found) < room and slot // size == (slot - step) // size:
                other = by_slot.get(slot)
                child, parent = (other, last) if step > 0 else (last, other)
                if other is None or parent is None or child is None or d.parent[child] != d.key[parent]:
                    break
                found.append(by_slot.pop(slot))
                last, slot = other, slot + step
    return np.array(found, np.int64)
