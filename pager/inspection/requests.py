"""Views of answered requests: time to first token as a ledger that sums.

Lines are the phases that the engine booked, exclusive in time. The wait for blocks is split by what the copies of the
request's own blocks took, from the decision ring: copies that ran while something else was computed come back as a
negative line, waiting that no copy of its blocks explains is waiting for room. So the lines add up whatever overlapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...tiers.errors import ConfigError
from .events import OF_MOVE
from .observer import RequestRecord
from .views import MAX_LIMIT

if TYPE_CHECKING:
    from ..core import Core
    from ..page_table import Sequence

WAIT = "wait_for_blocks"
WAYS_UP = ("nvme_to_host", "host_to_device")
MEANING = {
    "queued": "behind other requests' steps, or for a place among the active",
    "schedule": "planning of steps",
    "match": "look-up of the prompt",
    "prefill": "computing the prompt",
    "decode": "the step of the first token",
    "sample": "choosing the token",
    "unexplained": "no phase claims it",
}


@dataclass(frozen=True, slots=True)
class Copy:
    """Some of a request's blocks on their way up, in seconds of the pager's clock, cut to the time that was asked about."""

    way: str
    started_s: float
    ended_s: float
    nbytes: int


def copies_of(core: Core, seq: Sequence, from_s: float, to_s: float) -> list[Copy]:
    """Copies up of this sequence's blocks within a time, in order of their way."""
    ring, found = core.observer.events, []
    batches = ring.batches()
    batches = batches[(batches["time_s"] >= from_s) & (batches["started_s"] <= to_s)]
    for way in WAYS_UP:
        for batch in batches[batches["kind"] == OF_MOVE[way][0]]:
            group = core.groups[int(batch["group"])]
            own = int(np.isin(ring.blocks_of(batch)[0], seq.tables[group.index].ids).sum())
            if own:
                span = max(from_s, float(batch["started_s"])), min(to_s, float(batch["time_s"]))
                found.append(Copy(way, *span, own * group.tier_bytes(way.partition("_to_")[0])))
    return found


def _seconds_by_way(copies: list[Copy]) -> dict[str, float]:
    """Overlapping ones of one way count once."""
    return {way: _union_s([(c.started_s, c.ended_s) for c in copies if c.way == way]) for way in WAYS_UP}


def _union_s(spans: list[tuple[float, float]]) -> float:
    total, end_s = 0.0, float("-inf")
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, end_s))
        end_s = max(end_s, high)
    return total


def why(core: Core, *, request: str = "", slowest: int = 0) -> dict[str, Any]:
    """One request by number or name ("" is the last), or the slowest few of those that are remembered."""
    if slowest < 0:
        raise ConfigError(f"slowest={slowest}: need 1 or more, or 0 for one request")
    with core.lock:
        records, now_s = list(core.observer.requests), core.clock()
    if not records:
        return {"requests": [], "remembered": 0}
    if slowest:
        chosen = sorted(records, key=lambda record: -record.lines_s["ttft_s"])[: min(slowest, MAX_LIMIT)]
    elif request:
        chosen = [r for r in records if request in (r.name, f"req-{r.number}", str(r.number))][-1:]
        if not chosen:
            raise ConfigError(
                f"request {request!r} is not among the last {len(records)}; `why --slowest 10` lists some that are"
            )
    else:
        chosen = records[-1:]
    return {"requests": [_told(core, record, now_s) for record in chosen], "remembered": len(records)}


def _told(core: Core, record: RequestRecord, now_s: float) -> dict[str, Any]:
    lines = [{"line": name, "seconds": s, "note": note} for name, s, note in _lines(record)]
    return {
        "number": record.number,
        "name": record.name or f"req-{record.number}",
        "namespace": record.namespace,
        "session": record.session_id,
        "outcome": record.outcome,
        "age_s": now_s - record.started_s,
        "ttft_s": record.lines_s["ttft_s"],
        "lines": lines,
        "usage": record.usage,
    }


def _lines(record: RequestRecord) -> list[tuple[str, float, str]]:
    """Name, seconds and note of every line but the sum; they add up to the time to first token."""
    spent = {name: s for name, s in record.lines_s.items() if name not in ("ttft_s", WAIT)}
    lines: list[tuple[str, float, str]] = [
        (name, spent.pop(name), MEANING[name]) for name in ("queued", "schedule", "match") if name in spent
    ]
    copied_s = sum(record.copies_s.values())
    for way, seconds in record.copies_s.items():
        if seconds:
            size = record.copied_bytes.get(way, 0)
            lines.append((way.replace("_to_", " > "), seconds, f"{size} bytes"))
    rest_s = record.lines_s.get(WAIT, 0.0) - copied_s
    if rest_s < 0:
        lines.append(("hidden behind compute", rest_s, "copies that ran while something else was computed"))
    elif rest_s > 0:
        lines.append(("waiting for room", rest_s, "pages or slots that others hold, and making new ones"))
    lines += [(name, spent.pop(name), MEANING[name]) for name in ("prefill", "decode", "sample") if name in spent]
    unexplained_s = spent.pop("unexplained", 0.0)
    lines += [(name, seconds, "") for name, seconds in spent.items()]
    return [*lines, ("unexplained", unexplained_s, MEANING["unexplained"])]


def note(
    core: Core,
    seq: int,
    *,
    name: str,
    age_s: float,
    outcome: str,
    lines_s: dict[str, float],
    usage: dict[str, float],
) -> None:
    """Remember an answered request; `age_s` is how long ago it came, `lines_s` its ledger."""
    with core.lock:
        state, began_s = core.sequences.get(seq), core.clock() - age_s
        copies = copies_of(core, state, began_s, began_s + lines_s["ttft_s"]) if state is not None else []
        record = core.observer.answered(
            name=name,
            namespace=state.namespace if state is not None else "",
            session_id=state.session_id if state is not None else None,
            started_s=began_s,
            outcome=outcome,
            lines_s=lines_s,
            usage=usage,
            copies_s=_seconds_by_way(copies),
            copied_bytes={way: sum(c.nbytes for c in copies if c.way == way) for way in WAYS_UP},
        )
        listener = core.observer.on_answered
    if listener is not None:
        listener(record, copies, began_s + age_s)
