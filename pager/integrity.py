"""Integrity of one layer group's books: the list of facts by which directory, pages, host slots and references tell one story.

Two readers: `check_group` raises at the first fact that does not hold, for tests after every step; inspection/checks.py tells
all of them, for people and probes. Walks everything and changes nothing; each fact is one pass over arrays. Guards that the
two sides of every relation (page and block, slot and block, key and block, references and their holders) agree, whatever
order of completions led there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import eq
from typing import TYPE_CHECKING

import numpy as np

from ..tiers.errors import InvariantError
from .states import NOWHERE, PAGE_MOVES, IntArray, PageState, SlotState

if TYPE_CHECKING:
    from .group import BlockGroup
    from .page_table import BlockTable


@dataclass(frozen=True, slots=True)
class Fact:
    """`broken`: the blocks, pages or slots of which it does not hold, or two numbers that should be the same."""

    rule: str
    what: str
    broken: list[int]
    total: int


def check_group(
    group: BlockGroup, tables: Iterable[IntArray], reserved: IntArray, looked_at: Iterable[BlockTable] = ()
) -> None:
    """Raises InvariantError at the first contradiction. Cost: O(blocks + pages + slots)."""
    for fact in facts(group, tables, reserved, looked_at):
        if fact.broken:
            raise InvariantError(
                f"group {group.index} ({group.layout.name}): {fact.what} do not agree: {fact.broken[:5]}"
            )


def facts(
    group: BlockGroup, tables: Iterable[IntArray], reserved: IntArray, looked_at: Iterable[BlockTable] = ()
) -> Iterator[Fact]:
    """`tables` are block ids, once per reference; `reserved` host slots are STAGING without a move of ours; `looked_at` are
    tables that may remember where their blocks lie."""
    yield _references(group, tables)
    yield _rows(group, looked_at)
    yield from _pages(group)
    yield from _host_slots(group)
    d = group.directory
    wrong = []
    if not all(map(eq, map(d.key.__getitem__, d.by_key.values()), d.by_key)):
        wrong = [b for key, b in d.by_key.items() if d.key[b] != key]
    yield Fact("K1", "key <-> block", wrong, len(d.by_key))
    if not group.moves:
        yield from _nothing_moves(group, reserved)


def _references(group: BlockGroup, tables: Iterable[IntArray]) -> Fact:
    d = group.directory
    ids = np.concatenate([np.empty(0, np.int64), *tables])
    refs = np.bincount(ids[ids >= 0], minlength=len(d.refs))
    return _fact("B3", "references", refs != d.refs)


def _rows(group: BlockGroup, tables: Iterable[BlockTable]) -> Fact:
    d, pages, wrong, total = group.directory, group.pages, [], 0
    for table in tables:
        if (row := table.known_row(pages.num_left)) is not None:
            total += 1
            is_true = np.array_equal(row.ids, table.ids) and np.array_equal(row.pages, d.page[row.ids])
            if not is_true or not pages.readable(row.pages).all():
                wrong.append(int(row.ids[0]))
    return Fact("B8", "remembered places and tables", wrong, total)


def _pages(group: BlockGroup) -> Iterator[Fact]:
    d, pages = group.directory, group.pages
    is_free = pages.state == PageState.FREE
    used = np.flatnonzero(~is_free)
    yield _fact("B1", "page <-> block", d.page[pages.block[used]] != used, used)
    yield _equal("B4", "free pages", pages.num_free, len(pages) - len(used))
    yield _fact("R5", "pins or copies of free pages", is_free & ((pages.pins != 0) | (pages.copies != 0)))
    yield _equal("B5", "pages of live blocks", int((d.page[d.is_live] != NOWHERE).sum()), len(used))
    clean = pages.block[pages.state == PageState.RESIDENT]
    yield _fact("R6", "RESIDENT without a copy below", ~(d.in_host(clean) | d.nvme_valid[clean]), clean)


def _host_slots(group: BlockGroup) -> Iterator[Fact]:
    d, host = group.directory, group.host
    taken = np.flatnonzero(host.state != SlotState.NONE)
    held = taken[host.state[taken] != SlotState.LINKED]
    yield _fact("B2", "host slot <-> block", d.host_slot[host.block[held]] != held, held)
    yield _equal("B6", "free host slots", host.num_free, len(host) - len(taken))
    if group.forms.packed is not None:
        linked = np.setdiff1d(taken, held)
        wrong = [] if np.array_equal(group.forms.packed.linked(held), linked) else linked.tolist() or [NOWHERE]
        yield Fact("B7", "links of host slots", wrong, len(linked))


def _nothing_moves(group: BlockGroup, reserved: IntArray) -> Iterator[Fact]:
    pages, host = group.pages, group.host
    yield _fact("S1", "moving page without a move", PAGE_MOVES[pages.state])
    yield _fact("S2", "copies left over", pages.copies != 0)
    staging = np.flatnonzero(host.state == SlotState.STAGING)
    wrong = ~np.isin(staging, reserved) if len(staging) else np.zeros(0, bool)
    yield _fact("S3", "staging slot without a move", wrong, staging)


def _fact(rule: str, what: str, is_wrong: np.ndarray, ids: IntArray | None = None) -> Fact:
    """`ids` are what the flags are about, in their order; without it the flags' own places are."""
    places = is_wrong.nonzero()[0]
    broken = (places if ids is None else ids[places]).tolist()
    return Fact(rule, what, broken, len(is_wrong))


def _equal(rule: str, what: str, counted: int, there: int) -> Fact:
    return Fact(rule, what, [] if counted == there else [counted, there], there)
