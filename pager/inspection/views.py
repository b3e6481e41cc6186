"""Views: sessions, blocks and prefixes as plain values, each reply bounded by `limit` and told what it left out.

Array code over the books, a copy taken under the lock and sorted outside it, so that a look at a million blocks holds up
nobody for long. Times are ages in seconds. No token id and no more of a key than its tag leaves here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...tiers.errors import ConfigError, UnknownSessionError
from ..prefix import match_keys
from ..states import NOWHERE, IntArray, PageState, SlotState
from .places import GONE, NVME, PLACES, Owner, bytes_by_place, is_dirty, last_used_s, map_of, owners, place_of

if TYPE_CHECKING:
    from ..core import Core
    from ..group import BlockGroup

MAX_LIMIT, MAX_MAP = 1000, 1 << 17
SESSION_SORTS = ("device", "host", "nvme", "tokens", "idle", "name")
BLOCK_SORTS = ("idle", "refs", "depth", "tokens", "block")
BLOCK_STATES = ("clean", "dirty", "pinned", "moving", "unreferenced")


# ---------------------------------------------------------------------- sessions
def sessions(
    core: Core, *, sort: str = "device", namespace: str = "", limit: int = 50, offset: int = 0
) -> dict[str, Any]:
    """Sessions and sequences with their bytes by tier, largest (or longest idle) first."""
    _one_of("sort", sort, SESSION_SORTS)
    now_s = core.clock()
    with core.lock:
        rows = [session_row(core, owner, now_s) for owner in owners(core) if namespace in ("", owner.namespace)]
    return sorted_sessions(rows, sort, limit, offset)


def sorted_sessions(rows: list[dict[str, Any]], sort: str, limit: int, offset: int = 0) -> dict[str, Any]:
    """The first so many of them, and how many there are."""
    if sort == "name":
        rows.sort(key=lambda row: row["name"])
    else:
        field = {"tokens": "tokens", "idle": "idle_s"}.get(sort, f"{sort}_bytes")
        rows.sort(key=lambda row: -1.0 if row[field] is None else row[field], reverse=True)
    return _page(rows, "sessions", limit, offset)


def session_row(core: Core, owner: Owner, now_s: float) -> dict[str, Any]:
    size, used_s = bytes_by_place(core, owner), last_used_s(core, owner)
    return {
        "name": owner.name,
        "namespace": owner.namespace,
        "state": _state(owner),
        "tokens": owner.tokens,
        "computed_tokens": owner.computed_tokens,
        "device_bytes": size["device"],
        "host_bytes": size["host"],
        "nvme_bytes": size["nvme"],
        "idle_s": max(0.0, now_s - used_s) if used_s else None,
    }


def _state(owner: Owner) -> str:
    if owner.num_leases:
        return "running"
    if owner.seq is not None:
        return "open"
    return "durable" if owner.is_durable else "parked"


def session(core: Core, *, session: str) -> dict[str, Any]:
    """One session: its row, and per layer group a letter for each of its blocks."""
    with core.lock:
        owner = find_owner(core, session)
        row = session_row(core, owner, core.clock())
        maps = []
        for group, table in zip(core.groups, owner.tables, strict=False):
            shown = table.ids[:MAX_MAP]
            maps.append(
                {
                    "group": group.layout.name,
                    "block_bytes": group.layout.block_bytes,
                    "blocks": len(table),
                    "dirty": int(is_dirty(group, table.ids).sum()),
                    "map": map_of(group, shown),
                    "map_is_cut": len(shown) < len(table),
                }
            )
    return {"session": row, "block_size": core.block_size, "groups": maps}


def find_owner(core: Core, name: str) -> Owner:
    """Raises UnknownSessionError."""
    for owner in owners(core):
        if owner.name == name:
            return owner
    raise UnknownSessionError(f"no session or sequence {name!r}; `pager-inspect sessions` lists them")


# ---------------------------------------------------------------------- blocks
def blocks(
    core: Core,
    *,
    tier: str = "",
    state: str = "",
    group: int = -1,
    key: str = "",
    sort: str = "idle",
    reverse: bool = False,
    limit: int = 50,
    offset: int = 0,
) -> dict[str, Any]:
    """Blocks by filter, longest idle (or most referenced, deepest, ...) first. Cost: array passes over the directory."""
    _one_of("sort", sort, BLOCK_SORTS)
    _one_of("tier", tier, ("", *PLACES[:3]))
    _one_of("state", state, ("", *BLOCK_STATES))
    if not -1 <= group < len(core.groups):
        raise ConfigError(f"group={group}: this pager has layer groups 0 to {len(core.groups) - 1}")
    limit, offset, now_s = check_limit(limit), check_offset(offset), core.clock()
    asked = core.groups if group < 0 else [core.groups[group]]
    found = []
    for held in asked:
        with core.lock:
            ids, place = _chosen(held, tier, state, key)
            found.append((ids, place, _rank(held, ids, sort)))
    ids, place, rank = (np.concatenate(column) for column in zip(*found, strict=True))
    whose = np.repeat(np.arange(len(asked)), [len(one[0]) for one in found])
    shown = _first(rank if reverse else -rank, offset + limit)[offset:].tolist()
    with core.lock:
        rows = [_block_row(core, asked[whose[i]], int(ids[i]), int(place[i]), now_s) for i in shown]
    by_tier = dict(zip(PLACES[:3], np.bincount(place, minlength=4).tolist(), strict=False))
    return {"blocks": rows, "total": len(ids), "offset": offset, "by_tier": by_tier}


def _chosen(group: BlockGroup, tier: str, state: str, key: str) -> tuple[IntArray, IntArray]:
    d = group.directory
    ids = d.live()
    if key:
        ids = ids[d.tag[ids] == parse_tag(key)]
    place = place_of(group, ids)
    keep = place != GONE if tier == "" else place == PLACES.index(tier)
    if state == "dirty":
        keep &= is_dirty(group, ids)
    elif state == "clean":
        keep &= ~is_dirty(group, ids)
    elif state == "unreferenced":
        keep &= d.refs[ids] == 0
    elif state == "pinned":
        pages = d.page[ids]
        keep &= ((pages >= 0) & (group.pages.pins[np.maximum(pages, 0)] > 0)) | (d.pinned_until[ids] > group.clock())
    elif state == "moving":
        pages = d.page[ids]
        keep &= ((pages >= 0) & (group.pages.copies[np.maximum(pages, 0)] > 0)) | (d.nvme_holds[ids] > 0)
    return ids[keep], place[keep]


def _rank(group: BlockGroup, ids: IntArray, sort: str) -> Any:
    d = group.directory
    if sort == "idle":
        return -d.used_s[ids]
    return getattr(d, sort)[ids] if sort != "block" else ids  # refs, depth and tokens are columns of that name


def _first(rank: Any, n: int) -> IntArray:
    """Indices of the n lowest, in order; of equals the first, so that one page goes on where the one before ended."""
    if n < len(rank):
        last = np.partition(rank, n - 1)[n - 1]
        below = np.flatnonzero(rank < last)
        chosen = np.sort(np.concatenate([below, np.flatnonzero(rank == last)[: n - len(below)]]))
        return chosen[np.argsort(rank[chosen], kind="stable")]
    return np.argsort(rank, kind="stable")


def _block_row(core: Core, group: BlockGroup, block: int, place: int, now_s: float) -> dict[str, Any]:
    d, page, slot = group.directory, int(group.directory.page[block]), int(group.directory.host_slot[block])
    used_s = float(d.used_s[block])
    return {
        "block": block,
        "group": group.index,
        "key": shown_tag(int(d.tag[block])) if d.is_named[block] else None,
        "tier": PLACES[place],
        "also_in": [
            name
            for name, there in (
                ("host", slot >= 0 and group.host.state[slot] == SlotState.VALID),
                ("nvme", bool(d.nvme_valid[block])),
            )
            if there and name != PLACES[place]
        ],
        "state": PageState(group.pages.state[page]).name.lower() if page >= 0 else "valid",
        "refs": int(d.refs[block]),
        "depth": int(d.depth[block]),
        "tokens": int(d.tokens[block]),
        "pins": int(group.pages.pins[page]) if page >= 0 else 0,
        "pinned_for_s": max(0.0, float(d.pinned_until[block]) - now_s),
        "idle_s": max(0.0, now_s - used_s) if used_s else None,
    }


# ---------------------------------------------------------------------- prefix
def prefix(core: Core, *, tokens: bytes, namespace: str = "default") -> dict[str, Any]:
    """How much of a prompt is held, in which tiers, and why it ends where it does. Changes and counts nothing."""
    if len(tokens) % 4:
        raise ConfigError(f"tokens: {len(tokens)} bytes are no whole number of 32-bit token ids")
    token_ids = np.frombuffer(tokens, "<u4").tolist()
    with core.locked():
        keys: list[bytes] = []
        core.chain(namespace).extend(keys, token_ids)
        end, found = match_keys(core, keys)
        slowest = np.zeros(end, np.int64)
        for group, ids in zip(core.groups, found, strict=True):
            slowest = np.where(ids >= 0, np.maximum(slowest, np.minimum(place_of(group, ids), NVME)), slowest)
        reply = {
            "tokens": len(token_ids),
            "hit_tokens": end * core.block_size,
            "block_size": core.block_size,
            "blocks": len(keys),
            "hit_blocks": end,
            "runs": _runs(slowest),
            "break": _break(core, keys, end, len(token_ids)),
        }
    return reply


def _break(core: Core, keys: list[bytes], end: int, num_tokens: int) -> dict[str, Any] | None:
    """What stands at the first block that is not held."""
    if end == len(keys):
        rest = num_tokens - end * core.block_size
        return {"block": end, "token": end * core.block_size, "why": "tail", "tokens": rest} if rest else None
    at: dict[str, Any] = {"block": end, "token": end * core.block_size, "key": keys[end][:4].hex()}
    ghost = core.ghosts.get(keys[end])
    held = [int(group.directory.find([keys[end]])[0]) for group in core.groups]
    again = _held_again(core, keys, end)
    if ghost is not None:
        at |= {"why": "evicted", "tier": ghost.tier, "reason": ghost.reason, "age_s": core.clock() - ghost.evicted_s}
    elif any(block != NOWHERE for block in held):
        at |= {"why": "incomplete"}  # some layer groups lost theirs, or a window behind it is not whole
    else:
        at |= {"why": "never held"}
    return at | {"held_again_blocks": again}


def _held_again(core: Core, keys: list[bytes], end: int) -> int:
    """Blocks after the break that every full-attention group has: their gap could be computed alone."""
    has = np.ones(len(keys) - end, bool)
    for group in core.groups:
        if group.layout.window is None:
            has &= group.directory.is_valid(group.directory.find(keys[end:]))
    return int(has.sum())


def _runs(places: IntArray) -> list[dict[str, Any]]:
    """Neighbouring blocks of one tier as one row."""
    if not len(places):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(places)) + 1, [len(places)]])
    return [
        {"tier": PLACES[places[low]], "first": int(low), "blocks": int(high - low)}
        for low, high in zip(starts[:-1][:MAX_LIMIT], starts[1:], strict=False)
    ]


# ---------------------------------------------------------------------- shared
def shown_tag(tag: int) -> str:
    return f"{tag:08x}"


def parse_tag(text: str) -> int:
    """Raises ConfigError unless it is the first eight hexadecimal digits of a key."""
    try:
        if len(text) == 8:
            return int(text, 16)
    except ValueError:
        pass
    raise ConfigError(f"key={text!r}: give the first eight hexadecimal digits, as `blocks` shows them")


def _page(rows: list[dict[str, Any]], name: str, limit: int, offset: int) -> dict[str, Any]:
    limit, offset = check_limit(limit), check_offset(offset)
    return {name: rows[offset : offset + limit], "total": len(rows), "offset": offset}


def check_limit(limit: int) -> int:
    if not 1 <= limit <= MAX_LIMIT:
        raise ConfigError(f"limit={limit}: need 1 to {MAX_LIMIT}; sessions and blocks go on at offset")
    return limit


def check_offset(offset: int) -> int:
    if offset < 0:
        raise ConfigError(f"offset={offset}: need 0 or more, the rows to skip")
    return offset


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown; choose {', '.join(k for k in known if k)}")
