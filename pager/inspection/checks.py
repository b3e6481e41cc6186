"""Checks: the books' invariants by name, each told as holding or not; nothing is raised and nothing is changed.

Array code under the lock, so that a check of a million blocks holds up the pager for a moment and not for seconds.
`Core.check_integrity` raises at the first contradiction, for tests; this lists them all, for people and probes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..states import PageState, SlotState

if TYPE_CHECKING:
    from ..core import Core
    from ..group import BlockGroup

SLOW_LOCK_S, OLD_MOVE_S = 1.0, 30.0
Check = tuple[str, str, str, str]  # rule, what it says, "ok" | "warn" | "crit", detail


def check(core: Core) -> dict[str, Any]:
    """Every rule with its verdict; `findings` counts those that do not hold."""
    asked_s = time.monotonic()
    with core.lock:
        waited_s = time.monotonic() - asked_s
        rows = [("P1", "the pager answers", "ok" if waited_s < SLOW_LOCK_S else "warn", f"{waited_s * 1e3:.1f} ms")]
        for group in core.groups:
            rows += _books(core, group)
        rows += _traffic(core)
    checks = [
        {"rule": rule, "what": what, "verdict": verdict, "detail": detail} for rule, what, verdict, detail in rows
    ]
    return {"checks": checks, "findings": sum(row["verdict"] != "ok" for row in checks)}


def _books(core: Core, group: BlockGroup) -> Iterator[Check]:
    d, pages, host, name = group.directory, group.pages, group.host, group.layout.name
    used = np.flatnonzero(pages.state != PageState.FREE)
    free = pages.state == PageState.FREE
    yield _verdict("R5", f"{name}: free pages hold nothing", free & ((pages.pins > 0) | (pages.copies > 0)), len(pages))
    yield _verdict("B1", f"{name}: pages and blocks agree", d.page[pages.block[used]] != used, len(used))
    held = np.flatnonzero(host.state != SlotState.NONE)
    yield _verdict("B2", f"{name}: host slots and blocks agree", d.host_slot[host.block[held]] != held, len(held))
    refs = _references(core, group)
    yield _verdict("B3", f"{name}: references agree with tables", refs != d.refs, int(refs.sum()))
    clean = pages.block[pages.state == PageState.RESIDENT]
    alone = ~(d.in_host(clean) | d.nvme_valid[clean])
    yield _verdict("R6", f"{name}: clean pages have a copy below", alone, len(clean))
    blocks = list(d.by_key.values())
    wrong = int(list(map(d.key.__getitem__, blocks)) != list(d.by_key))
    yield _verdict("K1", f"{name}: keys name their blocks", np.array([wrong]), len(blocks))
    if not group.moves:
        moving = np.isin(pages.state, [PageState.FILLING, PageState.WRITING_BACK, PageState.EVICTING])
        yield _verdict("S1", f"{name}: no page moves without a copy", moving, len(pages))


def _references(core: Core, group: BlockGroup) -> Any:
    ids = np.concatenate([*core.references(group.index), np.empty(0, np.int64)])
    return np.bincount(ids[ids >= 0], minlength=len(group.directory.refs))


def _traffic(core: Core) -> Iterator[Check]:
    ages = [0.0]
    for group in core.groups:
        ages += [core.clock() - move.started_s for move in group.moves]
    count = len(ages) - 1
    is_old = max(ages) > OLD_MOVE_S
    yield "Q1", "copies arrive", "warn" if is_old else "ok", f"{count} in flight, oldest {max(ages):.1f} s"
    bad = int(core.counters.get("corrupt_blocks"))
    yield "C1", "checksums", "crit" if bad else "ok", f"{bad} blocks were bad since the start; none was served"
    failed = int(core.counters.get("failed_copies")) + int(core.counters.get("nvme_write_errors"))
    yield "C2", "copies succeed", "warn" if failed else "ok", f"{failed} failed since the start"
    if core.nvme is not None:
        takes = all(group.can_write_nvme for group in core.groups)
        error = "" if takes else core.nvme.last_write_error or "unknown error"
        yield "N1", "the nvme tier takes writes", "ok" if takes else "crit", error


def _verdict(rule: str, what: str, broken: Any, total: int) -> Check:
    bad = np.flatnonzero(broken)
    detail = f"{total:,} looked at" if not len(bad) else f"{len(bad):,} of {total:,} do not, first {bad[:3].tolist()}"
    return rule, what, "crit" if len(bad) else "ok", detail
