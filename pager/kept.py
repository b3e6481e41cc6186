"""Whole blocks that a tail keeps in full precision (`residual`). They are packed as well, so nothing ever depends on them:
one that is lost is read packed from then on, and with it those before it, for a tail is read without gaps.

A running sequence refers to them. A parked one has named them, as cache that makes room when others need it, and looks for
them by name when it is resumed; nobody else does. The pager's lock is held by whoever calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .page_table import BlockTable, Sequence, lowest_visible
from .states import NOWHERE

if TYPE_CHECKING:
    from .core import Core
    from .group import BlockGroup


def forget(group: BlockGroup, table: BlockTable, end: int) -> None:
    """The sequence of this table goes on without those before block `end`."""
    held = np.flatnonzero(table.ids[:end] >= 0)
    if len(held):
        blocks = table.ids[held]
        table.put(held, NOWHERE)
        group.unref(blocks)


def let_go(core: Core, tables: list[BlockTable], num_tokens: int) -> None:
    """Of a sequence that is parked: what is whole stays as cache."""
    for group, table in zip(core.groups, tables, strict=True):
        if group.layout.is_tail:
            forget(group, table, num_tokens // core.block_size)


def name(core: Core, seq: Sequence) -> None:
    """So that they are found again. One whose copy below was written without a name, and is all that there is, is not kept."""
    full = seq.num_computed // core.block_size
    seq.chain.extend(seq.keys, seq.token_ids[: full * core.block_size])
    for group, table in zip(core.groups, seq.tables, strict=True):
        if not group.layout.is_tail:
            continue
        d = group.directory
        for index in np.flatnonzero(table.ids[:full] >= 0)[::-1].tolist():
            block = table.ids[[index]]
            if d.is_named[block].all():
                continue
            if (d.nvme_slot[block] >= 0).all():  # there it lies under a name that means nothing after a restart
                is_still = d.nvme_valid[block].all() and not d.nvme_holds[block].any()
                if group.cold is None or not is_still or not (d.in_device(block) | d.in_host(block)).all():
                    forget(group, table, index + 1)
                    break
                group.cold.leave(block)
                group.dirty_if_alone(block)
            parent = seq.keys[index - 1] if index else None
            if not d.bind(int(block[0]), seq.keys[index], parent, core.block_size):
                forget(group, table, index + 1)  # an earlier one of that name, of which nothing is known
                break


def find(core: Core, seq: Sequence) -> None:
    """By name, for a sequence that is resumed: from the newest back to the first that is gone."""
    full = seq.num_computed // core.block_size
    for group, table in zip(core.groups, seq.tables, strict=True):
        if not group.layout.is_tail:
            continue
        low = lowest_visible(group.layout, seq.num_computed) // core.block_size
        ids = group.directory.find(seq.keys[low:full])
        gaps = np.flatnonzero(~group.directory.is_valid(ids))
        first = int(gaps[-1]) + 1 if len(gaps) else 0
        places = np.arange(low + first, full)
        if len(places) and (table.ids[places] == NOWHERE).all():
            table.put(places, ids[first:])
            group.ref(ids[first:])
