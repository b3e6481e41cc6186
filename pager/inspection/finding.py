"""Finding: one cause that doctor names; and what its rules share.

The rules are in doctor.py (any pager) and doctor_clients.py (a daemon and who uses it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .events import KIND, TIERS

if TYPE_CHECKING:
    from ..core import Core
    from ..group import BlockGroup

RECENT_S = 600.0
SEVERITIES = ("crit", "warn", "info")


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause. crit: act now; warn: look today; info: costs something, nothing is wrong."""

    name: str
    severity: str
    what: str
    mend: str
    see: str = ""


Rule = Callable[["Core"], Iterator[Finding]]


def recent(core: Core, kind: str, *, tier: str | None = None, within_s: float = RECENT_S) -> Any:
    """Batches of the decision ring, oldest first."""
    batches = core.observer.events.batches()
    keep = (batches["kind"] == KIND[kind]) & (batches["time_s"] >= core.clock() - within_s)
    if tier is not None:
        keep &= batches["tier"] == TIERS.index(tier)
    return batches[keep]


def quiet_s(core: Core, group: BlockGroup, kind: str) -> float:
    """Since the last batch of that kind in this group, or since the start."""
    last = recent(core, kind)
    last = last[last["group"] == group.index]
    return core.clock() - (float(last["time_s"][-1]) if len(last) else core.observer.started_s)
