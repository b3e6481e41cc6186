"""Where blocks are, as array code: the fastest tier that holds each, and what a sequence's blocks add up to.

Reads the books and changes nothing; the lock is held by whoever calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..states import IntArray, PageState

if TYPE_CHECKING:
    from ..core import Core
    from ..group import BlockGroup
    from ..page_table import BlockTable

DEVICE, HOST, NVME, GONE = range(4)
PLACES = ("device", "host", "nvme", "gone")
LETTERS = np.frombuffer(b"Hhn.D-", np.uint8)  # device host nvme gone; D: in the device tier only; -: not held (window)
DIRTY, NOT_HELD = 4, 5


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose tables these are: a session, or a sequence that belongs to none."""

    name: str
    session_id: str | None
    seq: int | None
    namespace: str
    tokens: int
    computed_tokens: int
    num_leases: int
    is_durable: bool
    tables: list[BlockTable]


def owners(core: Core) -> Iterator[Owner]:
    """Every session, active or parked, then every sequence without one."""
    claimed = set()
    for entry in core.sessions.values():
        seq = core.sequences.get(entry.active_seq) if entry.active_seq is not None else None
        if seq is not None:
            claimed.add(seq.id)
            sizes = (len(seq.token_ids), seq.num_computed, seq.num_leases)
            yield Owner(entry.session_id, entry.session_id, seq.id, entry.namespace, *sizes, False, seq.tables)
        else:
            sizes = (len(entry.token_ids), entry.num_computed, 0)
            tables = entry.tables or []
            yield Owner(entry.session_id, entry.session_id, None, entry.namespace, *sizes, entry.is_durable, tables)
    for seq in core.sequences.values():
        if seq.id not in claimed:
            sizes = (len(seq.token_ids), seq.num_computed, seq.num_leases)
            yield Owner(f"seq:{seq.id}", None, seq.id, seq.namespace, *sizes, False, seq.tables)


def place_of(group: BlockGroup, blocks: IntArray) -> IntArray:
    """Per block the fastest tier that holds it: DEVICE, HOST, NVME or GONE. Blocks of NOWHERE are GONE."""
    d, safe = group.directory, np.maximum(blocks, 0)
    place = np.where(
        d.in_device(safe), DEVICE, np.where(d.in_host(safe), HOST, np.where(d.nvme_valid[safe], NVME, GONE))
    )
    return np.where(blocks >= 0, place, GONE)


def is_dirty(group: BlockGroup, blocks: IntArray) -> npt.NDArray[np.bool_]:
    """Whether the device tier has the only copy."""
    pages = group.directory.page[np.maximum(blocks, 0)]
    return (blocks >= 0) & (pages >= 0) & (group.pages.state[np.maximum(pages, 0)] == PageState.DIRTY)


def map_of(group: BlockGroup, table: IntArray) -> str:
    """One letter per block of a table, in order."""
    shown = place_of(group, table)
    shown[is_dirty(group, table)] = DIRTY
    shown[table < 0] = NOT_HELD
    return LETTERS[shown].tobytes().decode()


def bytes_by_place(core: Core, owner: Owner) -> dict[str, int]:
    """Bytes of an owner's blocks by the fastest tier that holds each; shared blocks count for each who shares."""
    total = dict.fromkeys(PLACES[:3], 0)
    for group, table in zip(core.groups, owner.tables, strict=False):
        counts = np.bincount(place_of(group, table.ids), minlength=4)
        for place in (DEVICE, HOST, NVME):
            total[PLACES[place]] += int(counts[place]) * group.tier_bytes(PLACES[place])
    return total


def last_used_s(core: Core, owner: Owner) -> float:
    """When a step last read any of its blocks; 0 when that is not known."""
    latest = 0.0
    for group, table in zip(core.groups, owner.tables, strict=False):
        held = table.ids[table.ids >= 0]
        if len(held):
            latest = max(latest, float(group.directory.used_s[held].max()))
    return latest


def find_place(core: Core, tag: str) -> list[dict[str, int | str | bool]]:
    """Where the named blocks with this tag are now, in every layer group."""
    number, found = int(tag, 16), []
    for group in core.groups:
        d = group.directory
        for block in np.flatnonzero((d.tag == number) & d.is_named & d.is_live).tolist():
            place = int(place_of(group, np.array([block]))[0])
            row: dict[str, int | str | bool] = {"group": group.layout.name, "block": block, "tier": PLACES[place]}
            row |= {"in_host": bool(d.in_host(np.array([block]))[0]), "on_nvme": bool(d.nvme_valid[block])}
            row |= {"refs": int(d.refs[block]), "pinned": bool(d.pinned_until[block] > core.clock())}
            found.append(row)
    return found
