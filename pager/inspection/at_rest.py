"""A store that nobody has open, seen through the same verbs as a running pager, as far as its journal and records tell.

Reads the journal, takes no lock and writes nothing. What only a running pager knows (recency, references, other tiers)
is None here. A prompt is looked up with the namespace's default secret: a store holds none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...tiers.errors import ConfigError, KvTierError, UnknownSessionError
from ...tiers.layout import KVLayout, format_bytes
from ...tiers.nvme.identity import MANIFEST_FILE, check_format, read_identity
from ...tiers.nvme.manifest import Listing, replay
from ...tiers.nvme.status import read_store_status
from ..keys import KeyChain
from ..sessions import SessionEntry
from .events import tags_of
from .places import LETTERS, NOT_HELD, NVME
from .views import check_limit, check_offset, parse_tag, shown_tag

SCHEMA = 1
MIN_FREE_SHARE = 0.02  # of the file system


class RestingStore:
    """Identity and listing of one store, read once."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError, StoreMismatchError."""
        self.path, identity = path, read_identity(path)
        check_format(path, identity)
        self.layouts = [KVLayout.from_dict(fields) for fields in identity["layouts"]]
        self.fingerprint = "|".join([str(identity["model_fingerprint"]), *(x.fingerprint for x in self.layouts)])
        self.listing: Listing = replay(path / MANIFEST_FILE).listing

    @property
    def block_size(self) -> int:
        return self.layouts[0].block_size

    def keys(self, group: int) -> set[bytes]:
        listed = self.listing.group(group)
        return set(listed.stamps["key"][listed.slots()].tolist())

    def chain(self, namespace: str) -> KeyChain:
        return KeyChain(self.fingerprint, namespace, b"", self.block_size)


def answer(path: Path, verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The reply of a running pager, from the store alone. Raises: ConfigError."""
    views: dict[str, Callable[..., dict[str, Any]]] = {
        "sessions": _sessions,
        "session": _session,
        "blocks": _blocks,
        "prefix": _prefix,
        "explain": _explain,
        "doctor": _doctor,
        "check": _check,
    }
    told = {"schema": SCHEMA, "verb": verb, "source": "store"}
    if verb == "status":
        return told | {"store": read_store_status(path)}
    try:
        return told | views[verb](RestingStore(path), **arguments)
    except TypeError as error:
        raise ConfigError(f"{verb} of a store at rest: {error}") from error


def _sessions(
    store: RestingStore, *, sort: str = "tokens", namespace: str = "", limit: int = 50, offset: int = 0
) -> dict[str, Any]:
    limit, offset = check_limit(limit), check_offset(offset)
    rows = [_session_row(store, entry) for entry in _entries(store) if namespace in ("", entry.namespace)]
    rows.sort(key=(lambda row: row["name"]) if sort == "name" else (lambda row: -row["tokens"]))
    return {"sessions": rows[offset : offset + limit], "total": len(rows), "offset": offset}


def _entries(store: RestingStore) -> list[SessionEntry]:
    return [SessionEntry.from_record(name, record) for name, record in store.listing.sessions.items()]


def _session_row(store: RestingStore, entry: SessionEntry) -> dict[str, Any]:
    blocks = entry.summary.get("blocks", {})
    size = sum(int(blocks.get(f"g{i}", 0)) * layout.block_bytes for i, layout in enumerate(store.layouts))
    return {
        "name": entry.session_id,
        "namespace": entry.namespace,
        "state": "durable",
        "tokens": len(entry.token_ids),
        "computed_tokens": entry.num_computed,
        "device_bytes": 0,
        "host_bytes": 0,
        "nvme_bytes": size,
        "idle_s": None,
    }


def _session(store: RestingStore, *, session: str) -> dict[str, Any]:
    entry = next((entry for entry in _entries(store) if entry.session_id == session), None)
    if entry is None:
        raise UnknownSessionError(f"no session {session!r} in {store.path}; `pager-inspect sessions` lists them")
    keys: list[bytes] = []
    chain = store.chain(entry.namespace)
    if entry.branch is not None:
        chain = chain.branched(*entry.branch)
    chain.extend(keys, entry.token_ids[: entry.num_computed])
    tail = entry.token_ids[len(keys) * store.block_size : entry.num_computed]
    if tail:
        keys.append(chain.seal(keys[-1] if keys else None, tail, len(keys)))
    maps = []
    for index, layout in enumerate(store.layouts):
        held = store.keys(index)
        shown = np.array([NVME if key in held else NOT_HELD if layout.window else NVME + 1 for key in keys], np.int64)
        text = LETTERS[shown].tobytes().decode()
        row: dict[str, Any] = {"group": layout.name, "block_bytes": layout.block_bytes, "blocks": len(keys), "dirty": 0}
        maps.append(row | {"map": text, "map_is_cut": False})
    return {"session": _session_row(store, entry), "block_size": store.block_size, "groups": maps}


def _blocks(
    store: RestingStore,
    *,
    tier: str = "",
    state: str = "",
    group: int = -1,
    key: str = "",
    sort: str = "block",
    reverse: bool = False,
    limit: int = 50,
    offset: int = 0,
) -> dict[str, Any]:
    if state:
        raise ConfigError(f"state={state!r}: a store at rest knows no states; ask a running pager")
    limit, offset = check_limit(limit), check_offset(offset)
    rows, total = [], 0
    for index in range(len(store.layouts)) if group < 0 else [group]:
        listed = store.listing.group(index)
        slots = listed.slots() if tier in ("", "nvme") else listed.slots()[:0]
        tags = tags_of(listed.stamps["key"][slots])
        if key:
            keep = tags == parse_tag(key)
            slots, tags = slots[keep], tags[keep]
        total += len(slots)
        for slot, tag in list(zip(slots.tolist(), tags.tolist(), strict=True))[: offset + limit]:
            rows.append(_block_row(index, slot, tag, int(listed.stamps["tokens"][slot])))
    if sort == "tokens":
        rows.sort(key=lambda row: -row["tokens"])
    if reverse:
        rows.reverse()
    return {"blocks": rows[offset : offset + limit], "total": total, "offset": offset, "by_tier": {"nvme": total}}


def _block_row(group: int, slot: int, tag: int, tokens: int) -> dict[str, Any]:
    unknown: dict[str, Any] = dict.fromkeys(("refs", "depth", "pins", "idle_s"))
    row: dict[str, Any] = {
        "block": slot,
        "group": group,
        "key": shown_tag(tag) if tokens else None,
        "tier": "nvme",
        "also_in": [],
    }
    return row | {"state": "valid", "tokens": tokens, "pinned_for_s": 0.0} | unknown


def _prefix(store: RestingStore, *, tokens: bytes, namespace: str = "default") -> dict[str, Any]:
    token_ids, keys = np.frombuffer(tokens, "<u4").tolist(), []  # type: ignore[var-annotated]
    store.chain(namespace).extend(keys, token_ids)
    has = np.ones(len(keys), np.bool_)
    for index, layout in enumerate(store.layouts):
        if layout.window is None:
            held = store.keys(index)
            has &= np.array([key in held for key in keys], np.bool_)
    end = len(keys) if has.all() else int(np.argmin(has))
    size, rest = store.block_size, len(token_ids) - end * store.block_size
    at: dict[str, Any] | None = None
    if end < len(keys):
        at = {"block": end, "token": end * size, "key": keys[end][:4].hex(), "why": "not in the store"}
        at["held_again_blocks"] = int(has[end:].sum())
    elif rest:
        at = {"block": end, "token": end * size, "why": "tail", "tokens": rest}
    runs = [{"tier": "nvme", "first": 0, "blocks": end}] if end else []
    counts = {"tokens": len(token_ids), "hit_tokens": end * size, "blocks": len(keys), "hit_blocks": end}
    return counts | {"block_size": size, "runs": runs, "break": at}


def _explain(store: RestingStore, *, about: str, limit: int = 50) -> dict[str, Any]:
    """Where it is; why went with the pager that decided it."""
    check_limit(limit)
    is_session, now = about in store.listing.sessions, []
    for index, layout in enumerate([] if is_session else store.layouts):
        listed = store.listing.group(index)
        held = tags_of(listed.stamps["key"][listed.slots()]) == parse_tag(about)
        place = {"group": layout.name, "tier": "nvme", "in_host": False, "on_nvme": True, "pinned": False, "refs": None}
        now += [place] * int(held.sum())
    told = {"about": about, "is_session": is_session, "now": now, "ghost": None, "events": []}
    return told | {"events_left_out": 0, "ring_reaches_back_s": 0.0}


def _doctor(store: RestingStore) -> dict[str, Any]:
    """Books that do not agree, and a disk without room; all else shows in a pager at work."""
    found = [
        {
            "name": f"damaged store: {row['what']}",
            "severity": "crit",
            "what": row["detail"],
            "mend": "`kvtier store check` reads every block; what is lost is computed again",
            "see": "check",
        }
        for row in _check(store)["checks"]
        if row["verdict"] != "ok"
    ]
    disk = os.statvfs(store.path)
    if disk.f_bavail < MIN_FREE_SHARE * disk.f_blocks:
        free = (
            f"{format_bytes(disk.f_bavail * disk.f_frsize)} of {format_bytes(disk.f_blocks * disk.f_frsize)} are free"
        )
        mend = "free space, or set a smaller nvme_bytes: a disk that fills refuses writes"
        found.append({"name": "disk nearly full", "severity": "warn", "what": free, "mend": mend, "see": "status"})
    return {"findings": found}


def _check(store: RestingStore) -> dict[str, Any]:
    """The journal agrees with itself; `kvtier store check` reads every block."""
    checks = []
    for index, layout in enumerate(store.layouts):
        listed = store.listing.group(index)
        stamps = listed.stamps[listed.slots()]
        named = stamps["key"][stamps["tokens"] > 0].tolist()
        twice = len(named) - len(set(named))
        too_long = int((stamps["tokens"] > layout.block_size).sum())
        checks.append(_row("K1", f"{layout.name}: each key is listed once", twice, len(named)))
        checks.append(_row("K2", f"{layout.name}: no block has more tokens than fit", too_long, len(stamps)))
    bad = 0
    for name, record in store.listing.sessions.items():
        try:
            SessionEntry.from_record(name, record)
        except (KvTierError, LookupError, TypeError, ValueError):
            bad += 1
    checks.append(_row("S2", "session records can be read", bad, len(store.listing.sessions)))
    return {"checks": checks, "findings": sum(row["verdict"] != "ok" for row in checks)}


def _row(rule: str, what: str, bad: int, total: int) -> dict[str, Any]:
    detail = f"{total:,} looked at" if not bad else f"{bad:,} of {total:,} are not"
    return {"rule": rule, "what": what, "verdict": "crit" if bad else "ok", "detail": detail}
