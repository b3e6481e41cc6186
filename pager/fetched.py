"""Marks of prefetched blocks: brought to a tier before anybody asked, and not read there yet. And what became of them.

A mark is a bit per tier in the directory. It ends when the block is used (useful, or late while its copy is still on the way)
or leaves that tier (wasted); each is counted once, and told to the group's thrift. What went on from the host to the device
tier shares the fate of its copy there: its host copy has done its part and may go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .states import IntArray

if TYPE_CHECKING:
    from .group import BlockGroup

BIT = {"device": 1, "host": 2}
_ALL = (("device", 1), ("host", 2))


def started(group: BlockGroup, blocks: IntArray, tier: str) -> None:
    group.directory.fetched[blocks] |= BIT[tier]
    nbytes = len(blocks) * group.layout.block_bytes
    group.counters.add("prefetched_bytes", nbytes, tier=tier, outcome="started")
    group.thrift.started(nbytes)


def used(group: BlockGroup, blocks: IntArray) -> None:
    """Somebody reads these now. Cost: one look where nothing was prefetched."""
    d = group.directory
    marks = d.fetched[blocks]
    if not marks.any():
        return
    for tier, bit in _ALL:
        mine = blocks[(marks & bit) > 0]
        if len(mine):
            there = d.in_device(mine) if tier == "device" else d.in_host(mine) | d.in_device(mine)
            _settle(group, tier, "useful", int(there.sum()))
            _settle(group, tier, "late", int((~there).sum()))
    d.fetched[blocks] = 0


def left(group: BlockGroup, blocks: IntArray, tier: str) -> None:
    """These leave that tier."""
    d = group.directory
    marks = d.fetched[blocks]
    if tier == "host":
        _waste(group, blocks[marks == BIT["host"]], "host")
    elif tier == "device":
        up = blocks[(marks & BIT["device"]) > 0]
        _waste(group, up, "device")
        _waste(group, up[(d.fetched[up] > 0) & (d.host_slot[up] < 0)], "host")


def _waste(group: BlockGroup, blocks: IntArray, tier: str) -> None:
    group.directory.fetched[blocks] &= np.uint8(~BIT[tier] & 0xFF)
    _settle(group, tier, "wasted", len(blocks))


def _settle(group: BlockGroup, tier: str, outcome: str, count: int) -> None:
    if not count:
        return
    nbytes = count * group.layout.block_bytes
    group.counters.add("prefetched_bytes", nbytes, tier=tier, outcome=outcome)
    if outcome == "wasted":
        group.thrift.wasted(nbytes)
    else:
        group.thrift.useful(nbytes, is_late=outcome == "late")
