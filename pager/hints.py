"""Hints: what somebody who knows says of blocks, kept as marks in the directory and heeded wherever a tier makes room.

    release   not used again: leaves every tier first, and is not worth a copy to the one below
    demote    not used soon: leaves the device tier first; below, it has the place that its use gave it
    pin       stays in every tier until a time (`pinned_until`); stronger than the other two

A hint about a chain is about its own end. What lies before the last place where another chain parted from it is a common
beginning (a system prompt, a document) and stays as it is. The next use of a block takes its marks away. A wrong hint costs
time and nothing else: no mark lets a block leave that rules 5 to 7 keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .states import IntArray, PageState

if TYPE_CHECKING:
    from .directory import Directory
    from .group import BlockGroup


def own_end(d: Directory, chain: IntArray) -> IntArray:
    """The blocks of a chain, root first, that lie behind the last one that another chain continues too."""
    if not len(chain):
        return chain
    has_other = d.is_fork[chain]
    named = np.flatnonzero(d.is_named[chain])
    if len(named) and d.child_tag[chain[named[-1]]]:  # the end of this chain, and not of that child's
        has_other[named[-1]] = True
    forks = np.flatnonzero(has_other)
    return chain[int(forks[-1]) + 1 :] if len(forks) else chain


def release(group: BlockGroup, blocks: IntArray) -> None:
    """These are not used again."""
    if not len(blocks):
        return
    d = group.directory
    d.is_released[blocks] = True
    d.nvme_hit[blocks] = False  # a segment that is made clean does not keep them
    group.policy.on_release(blocks)
    group.note("released", "device", blocks, "client")


def demote(group: BlockGroup, blocks: IntArray) -> None:
    """These are not used soon."""
    group.directory.is_demoted[blocks] = True


def pin(group: BlockGroup, blocks: IntArray, until_s: float) -> None:
    """These stay wherever they are until then."""
    d = group.directory
    group.note("pinned", "device", blocks, "client")
    d.pinned_until[blocks] = np.maximum(d.pinned_until[blocks], until_s)
    group.last_pin_s = max(group.last_pin_s, until_s)


def used(d: Directory, blocks: IntArray) -> None:
    """Whatever was said of these is over."""
    d.is_released[blocks] = d.is_demoted[blocks] = False


def given_up(group: BlockGroup, blocks: IntArray) -> npt.NDArray[np.bool_]:
    """Released, referred to by nobody and not pinned: whatever it would cost to keep these is wasted."""
    d = group.directory
    return d.is_released[blocks] & (d.refs[blocks] == 0) & (d.pinned_until[blocks] <= group.clock())


def dirty_and_given_up(group: BlockGroup) -> IntArray:
    """Those of which only the device tier has the newest copy, and that no copy is reading."""
    pages = group.pages
    blocks = pages.block[(pages.state == PageState.DIRTY) & pages.idle()]
    return blocks[given_up(group, blocks)]
