"""Screens of what is there: status, sessions, block maps, blocks, prefixes. Values in, lines out; nothing is asked here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .text import Style, age, count, shortened, size, table, tier_name

Lines = Iterator[str]
MAP_LEGEND = "H device  D device only, not written down yet  h host  n nvme  . gone: computed again  - outside a window"


def status(told: dict[str, Any], style: Style) -> Lines:
    """The verdict first, numbers second."""
    if told.get("source") == "store":
        yield from _store(told["store"])
        return
    if "tiers" not in told:
        yield f"pagerd up {age(told['daemon']['uptime_s'])}: no model is open; {told['daemon']['connections']} clients"
        return
    yield from header(told, style)
    if "daemon" in told:
        yield _daemon(told["daemon"], told["model"], told["models"])
    for finding in told.get("findings", ()):
        if finding["severity"] != "info":
            mark = style.severity(f"  ! {finding['severity'].upper()}", finding["severity"])
            yield f"{mark} {finding['name']}: {finding['what']}  -> pager-inspect {finding['see'] or 'doctor'}"
    yield ""
    yield from tiers(told, style)
    yield _memory_line(told["tiers"]["host"]["memory"])
    if "nvme" in told["tiers"]:
        yield from _cold(told["tiers"]["nvme"])
    if "restart" in told:
        yield _restart(told["restart"])


def _daemon(daemon: dict[str, Any], model: int, models: list[int]) -> str:
    others = f" of {', '.join(map(str, models))}" if len(models) > 1 else ""
    return (
        f"pagerd: model {model}{others}  clients {daemon['connections']}  waiting {daemon['waiting_requests']}  "
        f"leased slots {daemon['pinned_slots']}" + ("  DRAINING" if daemon["is_draining"] else "")
    )


def header(told: dict[str, Any], style: Style) -> Lines:
    verdict = told.get("verdict", "")
    pinned = "pinned" if told["pinned_memory"] else "not pinned"
    block = sum(group["block_bytes"] for group in told["layer_groups"] if "block_bytes" in group)
    parts = [
        f"pager pid {told['pid']}",
        f"up {age(told['uptime_s'])}" if "uptime_s" in told else "",
        f"backend {told['backend']}",
        f"host memory {pinned}",
        f"block {told['block_size']} tok" + (f" = {size(block)}" if block else ""),
        f"sequences {told['sequences']}",
        f"sessions {told['sessions']}",
        f"copies in flight {told['transfers_in_flight']}",
        style.severity(verdict.upper(), verdict) if verdict else "",
    ]
    yield "  ".join(part for part in parts if part)


def tiers(told: dict[str, Any], style: Style) -> Lines:
    """A row per tier, and what was missed."""
    asked = sum(tier["hit_tokens"] for tier in told["tiers"].values()) + told["miss_tokens"]
    rows = []
    for name, tier in told["tiers"].items():
        used, capacity = tier["used_bytes"], tier["capacity_bytes"]
        rates = [
            f"{size(tier[f'rate_{way}_bytes_per_s'])}/s" if f"rate_{way}_bytes_per_s" in tier else "-"
            for way in ("in", "out")
        ]
        rows.append(
            [
                tier_name(name, told["backend"]),
                size(used),
                size(capacity),
                f"{used / capacity:.0%}" if capacity else "-",
                style.bar(used / capacity if capacity else 0.0),
                count(tier["blocks"]),
                size(tier["pinned_bytes"]),
                size(tier["dirty_bytes"]),
                size(tier["in_flight_bytes"]),
                f"{tier['hit_tokens'] / asked:.1%}" if asked else "-",
                count(tier["evicted_blocks"]),
                size(tier["bytes_in"]),
                size(tier["bytes_out"]),
                *rates,
            ]
        )
    heads = ["TIER", "USED", "CAPACITY", "FULL", "", "BLOCKS", "PINNED", "DIRTY", "MOVING", "HIT(tok)"]
    heads += ["EVICTED", "IN", "OUT", "IN/s", "OUT/s"]
    drop = [i for i in range(len(heads)) if i != 4 or style.bars]
    yield from table([heads[i] for i in drop], [[row[i] for i in drop] for row in rows])
    formats = {name: tier.get("formats", []) for name, tier in told["tiers"].items()}
    if any(set(kept) - {"full"} for kept in formats.values()):
        yield "formats: " + "  ".join(
            f"{name} {', '.join(dict.fromkeys(kept))}" for name, kept in formats.items() if kept
        )
    for name, tier in told["tiers"].items():
        if 0 < tier.get("stored_bytes", 0) < 0.98 * tier["used_bytes"]:
            yield f"{name}: blocks take {size(tier['stored_bytes'])} as stored; USED and CAPACITY count them whole"
    missed, ghosts = told["miss_tokens"], told["ghost_tokens"]
    yield f"missed {count(missed)} of {count(asked)} tokens asked for, {count(ghosts)} of them evicted before"


def _restart(restart: dict[str, Any]) -> str:
    dirty, drain_s = restart["dirty_bytes"], restart["drain_s"]
    if not dirty:
        return "restart now: nothing is lost that a tier below should hold"
    took = f", {drain_s:.1f} s to write down at the rate so far" if drain_s is not None else ""
    return f"restart now: {size(dirty)} of cache not written down would be lost{took}"


def _cold(cold: dict[str, Any]) -> Lines:
    """What only the cold tier has: its ring of segments, its disk, its quotas."""
    clean, segments = cold["clean_segments"], cold["segments"]
    ring = ", ".join(f"{c} of {n}" for c, n in zip(clean, segments, strict=True))
    way = "past the page cache" if cold["direct_io"] else "through the page cache (O_DIRECT refused)"
    amplified = f"written {cold['write_amplification']:.2f} times"
    yield f"nvme at {cold['path']}: {ring} segments clean, blocks {amplified}, {way}"
    if not cold["takes_writes"]:
        yield f"nvme takes no writes: {cold['last_write_error'] or 'unknown error'}; tried again every 30 s"
    elif cold["last_write_error"]:
        yield f"nvme refused a write earlier: {cold['last_write_error']}"
    for number, what in (
        (cold["corrupt_blocks"], "blocks failed their checks and were dropped"),
        (cold["failed_syncs"], "syncs failed; what they were for is not listed"),
        (cold["failed_index_writes"], "segment indexes could not be written; only stock Zarr readers notice"),
    ):
        if number:
            yield f"nvme: {number:,} {what}"
    for name, quota in cold["namespaces"].items():
        limit = _unit(quota["limit_bytes"]) if "limit_bytes" in quota else "no limit"
        yield f"nvme namespace {name}: {_unit(quota['used_bytes'])} of {limit}"


def _unit(n: float) -> str:
    text = size(n)
    return f"{text[:-1]} {text[-1]}iB" if text[-1].isalpha() else f"{text} B"


def _memory_line(memory: dict[str, Any]) -> str:
    """How much of the host tier is in memory, in what pages and where; then what could not be had, a line each."""
    huge = memory["huge_page_bytes"]
    line = (
        f"host memory: prefault {memory['prefault']}, {size(memory['prefaulted_bytes'])} of "
        f"{size(memory['prefault_total_bytes'])}"
        + (f", {size(huge)} in huge pages" if huge is not None else "")
        + f", NUMA {memory['numa_policy']} {', '.join(map(str, memory['numa_nodes']))}"
    )
    return "\n  ".join([line, *memory["notices"]])


def _store(store: dict[str, Any]) -> Lines:
    yield f"store at rest {store['path']}  format {store['format']}  model {store['model_fingerprint']}"
    for group in store["groups"]:
        yield f"  {group['name']:<12} {group['blocks']:>8} blocks {size(group['bytes']):>11}  {group['dtype']}"
    yield f"  sessions {store['sessions']}"


# ---------------------------------------------------------------------- sessions and maps
def sessions(told: dict[str, Any], style: Style) -> Lines:
    rows = [session_cells(row) for row in told["sessions"]]
    yield from table(SESSION_HEADS, rows, left=3)
    left = told["total"] - told["offset"] - len(rows)
    if left > 0:
        yield f"{left} more; --offset {told['offset'] + len(rows)} goes on"
    elif not rows:
        yield "no sessions"


SESSION_HEADS = ("SESSION", "NAMESPACE", "STATE", "TOKENS", "DEVICE", "HOST", "NVME", "IDLE")


def session_cells(row: dict[str, Any]) -> list[str]:
    return [
        shortened(row["name"], 24),
        shortened(row["namespace"], 20),
        row["state"],
        f"{row['tokens']:,}",
        *(size(row[f"{tier}_bytes"]) for tier in ("device", "host", "nvme")),
        age(row["idle_s"]),
    ]


def session(told: dict[str, Any], style: Style) -> Lines:
    """Its row and its blocks as a map, one letter each, with the token at which each line begins."""
    yield from table(SESSION_HEADS, [session_cells(told["session"])], left=3)
    yield MAP_LEGEND
    per_line = max(16, (style.width - 12) // 16 * 16)
    for group in told["groups"]:
        counts = {letter: group["map"].count(letter) for letter in "HDhn.-" if letter in group["map"]}
        summary = ", ".join(f"{letter} {number}" for letter, number in counts.items())
        yield f"\n{group['group']}: {group['blocks']} blocks of {size(group['block_bytes'])} ({summary})"
        for first in range(0, len(group["map"]), per_line):
            line = group["map"][first : first + per_line]
            yield f"{first * told['block_size']:>10,}  {_painted(line, style)}"
        if group["map_is_cut"]:
            yield "            the map ends here; the session has more blocks"


_MAP_COLORS = {"H": "green", "D": "yellow", ".": "red", "-": "dim"}


def _painted(line: str, style: Style) -> str:
    if not style.color:
        return line
    return "".join(style.paint(letter, _MAP_COLORS[letter]) if letter in _MAP_COLORS else letter for letter in line)


# ---------------------------------------------------------------------- blocks and prefixes
def blocks(told: dict[str, Any], style: Style) -> Lines:
    rows = []
    for row in told["blocks"]:
        pinned = f"{row['pins'] or ''}" + (f" ttl {age(row['pinned_for_s'])}" if row["pinned_for_s"] else "")
        rows.append(
            [
                row["block"],
                row["group"],
                row["key"] or "-",
                "+".join([row["tier"], *row["also_in"]]),
                row["state"],
                "-" if row["refs"] is None else row["refs"],
                "-" if row["depth"] is None else row["depth"],
                row["tokens"],
                pinned.strip() or "-",
                age(row["idle_s"]),
            ]
        )
    yield from table(
        ["BLOCK", "GROUP", "KEY", "TIERS", "STATE", "REFS", "DEPTH", "TOKENS", "PINNED", "IDLE"], rows, left=0
    )
    tiers_line = "  ".join(f"{tier} {number:,}" for tier, number in told["by_tier"].items())
    yield f"{len(rows)} of {told['total']:,} shown; fastest tier of each: {tiers_line}"


def prefix(told: dict[str, Any], style: Style) -> Lines:
    hit, total = told["hit_tokens"], told["tokens"]
    yield f"{hit:,} of {total:,} tokens would hit ({hit / total:.1%})" if total else "no tokens"
    for run in told["runs"]:
        first, last = run["first"] * told["block_size"], (run["first"] + run["blocks"]) * told["block_size"]
        yield f"  {first:>9,} .. {last:<9,} {run['tier']:<7} {run['blocks']:>6} blocks"
    if told["break"] is not None:
        yield from _break(told["break"], told["block_size"])


def _break(at: dict[str, Any], block_size: int) -> Lines:
    where = f"breaks at token {at['token']:,} (block {at['block']})"
    if at["why"] == "tail":
        yield f"{where}: the last {at['tokens']} tokens fill no block; parked tails are found by their session"
        return
    if at["why"] == "evicted":
        yield f"{where}: key {at['key']} was evicted from {at['tier']} {age(at['age_s'])} ago ({at['reason']})"
    elif at["why"] == "incomplete":
        yield f"{where}: key {at['key']} is held by some layer groups only"
    else:
        yield f"{where}: key {at['key']} {at['why']}; its tokens, or some before them, are not those that were stored"
    if at["held_again_blocks"]:
        yield f"  {at['held_again_blocks']:,} later blocks are held: only the gap would be computed"
