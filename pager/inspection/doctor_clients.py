"""What is wrong between a daemon and its clients: room that nobody gets, and one who has nearly all of it.

Rules as in doctor.py; in a pager without clients they find nothing. What clients did not get is remembered by the observer,
what they hold is told by the holders of the core.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ...tiers.layout import format_bytes
from ..states import IntArray, SlotState
from .finding import Finding, quiet_s, recent
from .places import owners

if TYPE_CHECKING:
    from ..core import Core
    from ..group import BlockGroup

FEW_REFUSALS, STARVED_S, LATELY_S = 4, 1.0, 60.0
HOG_SHARE = 0.45  # a client may hold half of all blocks at most


def starved_clients(core: Core) -> Iterator[Finding]:
    """Clients asked for room to write to for a second and longer, got none, and there is none still."""
    for group in core.groups:
        since_s = core.clock() - LATELY_S
        times = [time_s for time_s, index in core.observer.turned_away if index == group.index and time_s >= since_s]
        if len(times) < FEW_REFUSALS or times[-1] - times[0] < STARVED_S:
            continue
        if group.leaving.host_room() >= max(1, int(len(group.host) * core.config.low_watermark)):
            continue
        yield Finding(
            "write-back starved",
            "warn",
            f"clients were refused room for their blocks {len(times)} times in {times[-1] - times[0]:.0f} s; "
            f"{_who_has(core, group)}",
            "raise host_bytes, look for a client that does not let go of its slots, or mend what keeps the store from taking "
            "blocks",
            "blocks --state dirty",
        )


def _who_has(core: Core, group: BlockGroup) -> str:
    host, d = group.host, group.directory
    reserved, held = int((host.state == SlotState.STAGING).sum()), int((host.holds > 0).sum())
    told = f"of {len(host)} slots of group {group.layout.name!r} {reserved} are being written to, {held} are leased"
    if core.nvme is None:
        return told
    alone = int((~d.nvme_valid[host.block[host.state == SlotState.VALID]]).sum())
    return f"{told}, {alone} are not on nvme yet (last write {quiet_s(core, group, 'written'):.0f} s ago)"


def hogging_clients(core: Core) -> Iterator[Finding]:
    """One of several clients and parked sessions refers to nearly half of the host tier, and others' blocks had to leave."""
    if not core.holders or not len(recent(core, "evicted", tier="host", within_s=LATELY_S)):
        return
    sizes = [(sum(map(_host_bytes, core.groups, blocks)), name) for name, blocks in _shares(core)]
    capacity = sum(len(group.host) * group.forms.slot_bytes for group in core.groups)
    size, name = max(sizes, default=(0, ""))
    if len(sizes) < 2 or size < HOG_SHARE * capacity:
        return
    yield Finding(
        "one session hogs the host tier",
        "warn",
        f"{name} holds {format_bytes(size)} of {format_bytes(capacity)}; {len(sizes) - 1} other clients and sessions share the "
        "rest",
        "forget it or set a host_ceiling for its namespace, or raise host_bytes",
        "sessions",
    )


def _shares(core: Core) -> Iterator[tuple[str, list[IntArray]]]:
    """Who refers to blocks, and to which of each layer group."""
    for owner in owners(core):
        yield f"session {owner.name} (namespace {owner.namespace})", [table.ids for table in owner.tables]
    for holder in core.holders:
        yield from holder.shares()


def _host_bytes(group: BlockGroup, blocks: IntArray) -> int:
    held = np.unique(blocks[blocks >= 0])
    return group.forms.slots_held(held[group.directory.in_host(held)]) * group.forms.slot_bytes
