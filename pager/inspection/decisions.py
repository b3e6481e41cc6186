"""Views of decisions: why a block or a session is where it is, what happens now, and what thrashes."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ...tiers.errors import ConfigError
from .events import KIND, KINDS, TIERS
from .places import find_place, owners
from .views import MAX_LIMIT, check_limit, find_owner, parse_tag, shown_tag

if TYPE_CHECKING:
    from ..core import Core

SHOWN_KEYS = 4  # of a batch, as examples


def explain(core: Core, *, about: str, limit: int = 50) -> dict[str, Any]:
    """The recent decisions about one block (eight hexadecimal digits) or about the blocks of a session, newest last."""
    limit = check_limit(limit)
    with core.lock:
        now_s, ring = core.clock(), core.observer.events
        is_session = any(owner.name == about for owner in owners(core))
        if is_session:
            owner = find_owner(core, about)
            tags = [g.directory.tag[t.ids[t.ids >= 0]] for g, t in zip(core.groups, owner.tables, strict=False)]
            wanted = np.unique(np.concatenate(tags)) if tags else np.zeros(0, np.uint32)
            wanted = wanted[wanted > 0]
        else:
            wanted = np.array([parse_tag(about)], np.uint32)
        found = ring.about(wanted)
        rows = []
        for batch, tags_of_batch in zip(found.batches[-limit:], found.tags[-limit:], strict=True):
            row = ring.row(batch) | {"blocks": len(tags_of_batch), "keys": _examples(tags_of_batch)}
            row["age_s"] = now_s - row.pop("time_s")
            rows.append(row)
        now = find_place(core, about) if not is_session else []
        began_s = float(ring.batches()["time_s"][0]) if ring.num_written else now_s
        ghost = None if is_session else _ghost(core, about, now_s)
    return {
        "about": about,
        "is_session": is_session,
        "now": now,
        "ghost": ghost,
        "events": rows,
        "events_left_out": max(0, len(found.batches) - limit),
        "ring_reaches_back_s": now_s - began_s,
    }


def _ghost(core: Core, text: str, now_s: float) -> dict[str, Any] | None:
    """The block as remembered after its last copy left."""
    for key, ghost in core.ghosts.recent():
        if key[:4].hex() == text:
            return {"tier": ghost.tier, "reason": ghost.reason, "age_s": now_s - ghost.evicted_s}
    return None


def trace(core: Core, *, since: int = -1, limit: int = 200, types: str = "") -> dict[str, Any]:
    """Batches of decisions from a serial number on; `next` is where to go on. -1: the last `limit` of these kinds."""
    wanted = [name for name in types.split(",") if name]
    for name in wanted:
        if name not in KIND:
            raise ConfigError(f"types={name!r} is unknown; choose {', '.join(KINDS)}")
    limit = min(max(limit, 1), MAX_LIMIT)
    with core.lock:
        now_s, ring = core.clock(), core.observer.events
        batches = ring.batches(max(since, 0))
        lost = max(0, ring.first_serial - since) if since >= 0 else 0
        if wanted:
            batches = batches[np.isin(batches["kind"], [KIND[name] for name in wanted])]
        if since < 0:
            batches = batches[-limit:]
        rows = []
        for batch in batches[:limit]:
            row = ring.row(batch) | {"keys": _examples(ring.blocks_of(batch, SHOWN_KEYS)[1])}
            row["age_s"] = now_s - row.pop("time_s")
            rows.append(row)
        after = rows[-1]["serial"] + 1 if len(batches) > limit else ring.num_written
    return {"events": rows, "next": after, "lost": lost}


def thrash(core: Core, *, since_s: float = 600.0) -> dict[str, Any]:
    """Tokens that were asked for again after they had been evicted, by tier that they left and by who asked."""
    with core.lock:
        now_s, watch = core.clock(), core.observer
        from_s = now_s - since_s
        hits = [hit for hit in watch.ghost_hits if hit.time_s >= from_s]
        lookups = [lookup for lookup in watch.lookups if lookup.time_s >= from_s]
        dropped = watch.events.by_owner(KIND["dropped"], from_s)
    by_tier: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0, float("inf")])
    by_who: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(lambda: dict.fromkeys(TIERS, 0))
    for hit in hits:
        row = by_tier[hit.tier, hit.reason]
        row[0], row[1] = row[0] + hit.tokens, min(row[1], hit.age_s)
        by_who[hit.namespace, hit.session_id or f"seq:{hit.seq}"][hit.tier] += hit.tokens
    missed = sum(lookup.tokens - lookup.hit_tokens for lookup in lookups)
    ranked = sorted(by_who.items(), key=lambda item: -sum(item[1].values()))[:20]
    return {
        "since_s": since_s,
        "asked_tokens": sum(lookup.tokens for lookup in lookups),
        "missed_tokens": missed,
        "ghost_tokens": sum(hit.tokens for hit in hits),
        "dropped_blocks": sum(dropped.values()),
        "by_tier": [
            {"tier": tier, "reason": reason, "tokens": int(tokens), "soonest_s": soonest}
            for (tier, reason), (tokens, soonest) in sorted(by_tier.items())
        ],
        "by_session": [
            {"namespace": namespace, "session": name, **{f"{tier}_tokens": n for tier, n in tiers.items()}}
            for (namespace, name), tiers in ranked
        ],
    }


def _examples(tags: Any) -> list[str]:
    return [shown_tag(int(tag)) for tag in tags[:SHOWN_KEYS] if tag]
