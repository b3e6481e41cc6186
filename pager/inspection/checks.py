"""Checks: the books' invariants by name, each told as holding or not; nothing is raised and nothing is changed.

The facts are those of pager/integrity.py, which tests raise at; here they are told, with what is looked at beside the books.
Array code under the lock, so that a check of a million blocks holds up the pager for a moment and not for seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..integrity import Fact

if TYPE_CHECKING:
    from ..core import Core

SLOW_LOCK_S, OLD_MOVE_S = 1.0, 30.0
Check = tuple[str, str, str, str]  # rule, what it says, "ok" | "warn" | "crit", detail
SAYS = {  # what a fact of integrity.py says while it holds
    "B1": "pages and blocks agree",
    "B2": "host slots and blocks agree",
    "B3": "references agree with tables",
    "B4": "free pages are counted",
    "B5": "every used page has a live block",
    "B6": "free host slots are counted",
    "B7": "slots of one block are linked",
    "B8": "what sequences remember of their blocks' places is so",
    "K1": "keys name their blocks",
    "R5": "free pages hold nothing",
    "R6": "clean pages have a copy below",
    "S1": "no page moves without a copy",
    "S2": "no copy is counted that is over",
    "S3": "no slot waits for a copy that is over",
}


def check(core: Core) -> dict[str, Any]:
    """Every rule with its verdict; `findings` counts those that do not hold."""
    asked_s = time.monotonic()
    with core.lock:
        waited_s = time.monotonic() - asked_s
        rows = [("P1", "the pager answers", "ok" if waited_s < SLOW_LOCK_S else "warn", f"{waited_s * 1e3:.1f} ms")]
        rows += [_told(name, fact) for name, fact in core.facts()]
        rows += _traffic(core)
    checks = [
        {"rule": rule, "what": what, "verdict": verdict, "detail": detail} for rule, what, verdict, detail in rows
    ]
    return {"checks": checks, "findings": sum(row["verdict"] != "ok" for row in checks)}


def _told(group: str, fact: Fact) -> Check:
    detail = f"{fact.total:,} looked at"
    if fact.broken:
        detail = f"{len(fact.broken):,} of {fact.total:,} do not: {fact.what}, first {fact.broken[:3]}"
    return fact.rule, f"{group}: {SAYS[fact.rule]}", "crit" if fact.broken else "ok", detail


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
