"""Filling a lease where nothing has to move: what most decode steps ask for.

A sequence that runs again, one token further, reads pages that are resident and writes to a last page that is its own
and has room. Such a step copies nothing, takes no page and waits for nobody. Where its blocks lie is remembered with its
table, as a `Row`, until the table changes or some block leaves the device tier. Everything else is for `leasing`. Guards
what that guards: only readable pages enter a table and all of them are pinned (rules 1 and 6), and an append waits for a
copy-out of its page and makes it dirty (rule 4).

Plain numbers and few array operations, because the first use of each in a step costs ten times what it costs warm: the
model has just swept the processor's caches.
"""

from __future__ import annotations

import numpy as np

from .core import Core
from .group import BlockGroup
from .lease import GroupLease, Lease
from .page_table import BlockTable, Row
from .states import APPEND, PageState

_DIRTY = int(PageState.DIRTY)  # compared with numpy's numbers, an enumeration's member is converted every time
TOUCH_EVERY_S = 0.05  # recency need not be finer than this while a sequence runs step after step


def fill_in_place(core: Core, lease: Lease, group: BlockGroup, now_s: float) -> GroupLease | None:
    """This group's part of a lease; None, and nothing has changed, where a block has to come up or be made."""
    if lease.is_selected or lease.is_write_only or group.layout.window is not None:
        return None
    size, index, tables, rows = core.block_size, group.index, [], []
    for span in lease.spans:
        table = core.sequences[span.seq].tables[index]
        if span.end > len(table) * size or span.window is not None:
            return None
        row = table.known_row(group.pages.num_left) or _look(table, group)
        if row is None or not _is_own(group, row):
            return None
        tables.append(table)
        rows.append(row)
    for table, row in zip(tables, rows, strict=True):
        if now_s - table.touched_s >= TOUCH_EVERY_S:
            table.touched_s = now_s
            group.touch(row.ids, (row.logical[-1] - row.logical) * size)
        group.pages.pins[row.pages] += 1
        _append(core, group, row)
    if index == 0:
        core.counters.add("read_blocks", sum([len(row.ids) for row in rows]), tier="device")
    return _held(lease, rows, size)


def _look(table: BlockTable, group: BlockGroup) -> Row | None:
    """Find out, and remember it, where all of them are readable."""
    ids = table.ids.copy()
    pages = group.directory.page[ids]
    if not len(ids) or int(ids.min()) < 0 or not group.pages.readable(pages).all():  # rule 1
        return None
    table.row = Row(table.version, group.pages.num_left, ids, pages, pages.astype(np.int32)[None], np.arange(len(ids)))
    return table.row


def _is_own(group: BlockGroup, row: Row) -> bool:
    """Whether the last block may be written where it is: nothing names it and nobody else refers to it."""
    d, block = group.directory, int(row.ids[-1])
    return not d.is_named[block] and d.refs[block] == 1


def _append(core: Core, group: BlockGroup, row: Row) -> None:
    d, block = group.directory, int(row.ids[-1])
    if group.pages.state[row.pages[-1]] == _DIRTY and d.host_slot[block] < 0 and not d.nvme_valid[block]:
        d.version[block] += 1  # it is in no other tier, nor on its way to one
        return
    group.order(core.backend.compute, APPEND, row.pages[-1:])  # rule 4: an append waits for the copy-out
    group.mark_written(block)


def _held(lease: Lease, rows: list[Row], size: int) -> GroupLease:
    """What the lease holds: tables, lengths, and slots of spans whose new tokens lie in the last blocks of their rows."""
    table = rows[0].table
    if len(rows) > 1:
        table = np.full((len(rows), max([len(row.ids) for row in rows])), -1, np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row.ids)] = row.pages
    slots: list[int] = []
    for span, row in zip(lease.spans, rows, strict=True):
        first = int(row.pages[-1]) * size + span.start % size
        slots.extend(range(first, first + span.end - span.start))
    return GroupLease(
        table,
        np.array([span.end for span in lease.spans], np.int32),
        np.array(slots, np.int64),
        listed=[row.logical for row in rows],
        pinned=[row.pages for row in rows],
        written=[row.pages[-1:] for row in rows],
    )
