"""Screens of why: decisions, thrashing, ledgers, findings, checks, advice, history. Values in, lines out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from .text import Style, age, count, millis, share, size, table

Lines = Iterator[str]


def explain(told: dict[str, Any], style: Style) -> Lines:
    yield f"{'session' if told['is_session'] else 'block'} {told['about']}"
    for place in told["now"]:
        also = [name for name, there in (("host", place["in_host"]), ("nvme", place["on_nvme"])) if there]
        pinned = ", pinned by a client" if place["pinned"] else ""
        where = f"fastest copy in {place['tier']}, copies below: {', '.join(also) or 'none'}"
        refs = "" if place["refs"] is None else f", {place['refs']} references"
        yield f"now: group {place['group']}, {where}{refs}{pinned}"
    ghost = told["ghost"]
    if not told["is_session"] and not told["now"]:
        if ghost is None:
            yield "now: in no tier; no block of that key is known"
        else:
            yield f"now: gone; its last copy left {ghost['tier']} {age(ghost['age_s'])} ago: {ghost['reason']}"
    for row in told["events"]:
        yield event_line(row)
    if told["events_left_out"]:
        yield f"{told['events_left_out']} earlier ones left out; --limit shows more"
    if told.get("source") == "store":
        yield "a store at rest: why it is there went with the pager that decided it"
    else:
        yield f"the ring of decisions reaches back {age(told['ring_reaches_back_s'])}"


_WORDS = {
    "computed": "computed into a page of",
    "promoted": "copied up to",
    "demoted": "copied down to",
    "read": "read up to",
    "written": "written down to",
    "relocated": "moved within",
    "evicted": "evicted from",
    "dropped": "dropped, the last copy left",
    "pinned": "pinned in",
    "refused": "refused by",
    "corrupt": "found corrupt in",
    "failed": "failed on its way to",
}


def event_line(row: dict[str, Any]) -> str:
    took = f" in {millis(row['seconds'])}" if row["seconds"] else ""
    because = f", {row['reason']}" if row["reason"] else ""
    policy = f", policy {row['policy']}" if row["policy"] else ""
    keys = f"  {' '.join(row['keys'])}{' ..' if row['blocks'] > len(row['keys']) else ''}" if row["keys"] else ""
    return f"{age(row['age_s']):>6} ago  {row['blocks']:>5} {_WORDS[row['what']]} {row['tier']}{took}{because}{policy}{keys}"


def trace(told: dict[str, Any], style: Style) -> Lines:
    if told["lost"]:
        yield f"({told['lost']} batches were overwritten before they were read)"
    for row in told["events"]:
        yield event_line(row)


def thrash(told: dict[str, Any], style: Style) -> Lines:
    asked, missed, ghosts = told["asked_tokens"], told["missed_tokens"], told["ghost_tokens"]
    yield (
        f"last {age(told['since_s'])}: {count(asked)} tokens asked for, {count(missed)} missed, {count(ghosts)} of these "
        f"had been evicted ({share(ghosts, missed)}); {count(told['dropped_blocks'])} blocks left the last tier"
    )
    if told["by_tier"]:
        rows = [[r["tier"], r["reason"], f"{r['tokens']:,}", age(r["soonest_s"])] for r in told["by_tier"]]
        yield from table(("LEFT TIER", "WHY", "TOKENS ASKED AGAIN", "SOONEST AFTER"), rows, left=2)
        rows = [
            [r["namespace"], r["session"], *(f"{r[f'{tier}_tokens']:,}" for tier in ("device", "host", "nvme"))]
            for r in told["by_session"]
        ]
        yield from table(("NAMESPACE", "ASKED BY", "DEVICE", "HOST", "NVME"), rows, left=2)


def why(told: dict[str, Any], style: Style) -> Lines:
    if not told["requests"]:
        yield "no request was answered here yet; those of pagerd's clients are told by the clients' own pagers"
    for request in told["requests"]:
        yield from _ledger(request, style)


def _ledger(request: dict[str, Any], style: Style) -> Lines:
    usage = request["usage"]
    whose = f"session {request['session']}" if request["session"] else f"namespace {request['namespace']}"
    without_s = usage.get("cached_tokens", 0) * usage.get("prefill_s_per_token", 0)
    head = (
        f"{request['name']}  {whose}  prompt {usage.get('prompt_tokens', 0):,.0f} tok  TTFT {millis(request['ttft_s'])}"
    )
    if without_s:
        head += f"  (without the cache est. {millis(request['ttft_s'] + without_s)})"
    yield f"{head}  {request['outcome']}  {age(request['age_s'])} ago"
    tiers = {"device": "device_tokens", "host": "host_tokens", "nvme": "disk_tokens"}
    found = "  ".join(f"{tier} {usage.get(name, 0):,.0f}" for tier, name in tiers.items())
    yield f"  reused {usage.get('cached_tokens', 0):,.0f} tok: {found}; computed again {usage.get('recomputed_tokens', 0):,.0f}"
    largest = max((line["seconds"] for line in request["lines"]), default=0.0)
    for line in request["lines"]:
        note = line["note"]
        if note.endswith(" bytes"):
            note = f"{size(float(note.removesuffix(' bytes')))} of its blocks"
        mark = "  <- largest" if line["seconds"] == largest > 0 else ""
        name = line["line"].replace("_", " ")
        yield f"  {name:<24} {millis(line['seconds']):>12}   {note}{style.paint(mark, 'yellow')}"
    yield f"  {'sum':<24} {millis(sum(line['seconds'] for line in request['lines'])):>12}"


def doctor(told: dict[str, Any], style: Style) -> Lines:
    serious = [finding for finding in told["findings"] if finding["severity"] != "info"]
    if not serious:
        yield style.severity("nothing is wrong", "ok")
    for finding in told["findings"]:
        yield f"{style.severity(finding['severity'].upper(), finding['severity']):<5} {finding['name']}: {finding['what']}"
        yield f"      mend: {finding['mend']}"
        if finding["see"] and finding["severity"] != "info":
            yield f"      see:  pager-inspect {finding['see']}"


def check(told: dict[str, Any], style: Style) -> Lines:
    for row in told["checks"]:
        dots = "." * max(2, 52 - len(row["rule"]) - len(row["what"]))
        verdict = style.severity(row["verdict"].upper() if row["verdict"] != "ok" else "ok", row["verdict"])
        yield f"{row['rule']} {row['what']} {dots} {verdict}  ({row['detail']})"
    yield f"{told['findings']} findings"


def advise(told: dict[str, Any], style: Style) -> Lines:
    if not told["uses"]:
        yield "no prompt was looked up yet; there is nothing to advise from"
        return
    rate = told["sample_rate"]
    yield f"block uses hit at or above the {told['tier']} tier, by its size; {told['uses']:,.0f} uses, {rate:.1%} of keys"
    policies = list(next((row["policies"] for row in told["rows"] if row["policies"]), ()))
    rows = []
    for row in told["rows"]:
        name = "now" if row["factor"] == 1 else f"{row['factor']:g}x"
        band = f"{row['hit_rate']:.1%} ±{row['band']:.1%}"
        ttft = "-" if row["ttft_s"] is None else millis(row["ttft_s"])
        tried = [f"{row['policies'][policy]:.1%}" if row["policies"] else "-" for policy in policies]
        rows.append([size(row["tier_bytes"]), name, style.bar(row["hit_rate"], 30), band, ttft, *tried])
    yield from table(("SIZE", "", "", "HIT", "TTFT est.", *policies), rows, left=0)
    yield f"{told['ever_reused']:.1%} of uses are of blocks that were used before: no size hits more"
    if policies:
        yield f"by policy: prefixes hit, tried on the last {told['sampled_requests']:,} requests; {told['policy']} is at work"
    if told["measured_ttft_s"] is not None:
        yield f"TTFT: mean, measured {millis(told['measured_ttft_s'])} now; hits and misses at this pager's own rates"
    if not told["is_sure"]:
        yield "few uses were sampled so far: these figures will move"


def history(rows: list[dict[str, float]], style: Style) -> Lines:
    """Sparklines of rates and levels."""
    if len(rows) < 2:
        yield "fewer than two rows yet; a pager writes one every ten seconds"
        return
    width = max(20, style.width - 40)
    span_s = rows[-1]["time_s"] - rows[0]["time_s"]
    yield f"{len(rows)} rows over {age(span_s)}, the latest at the right"
    for name, what, show in (
        ("device_used_bytes", "device used", size),
        ("host_used_bytes", "host used", size),
        ("nvme_used_bytes", "nvme used", size),
        ("dirty_bytes", "not written down", size),
        ("sessions", "sessions", count),
    ):
        values = [row[name] for row in rows]
        yield f"{what:<18} {style.spark(values, width)}  {show(values[-1])}"
    for name, what, show in (
        ("miss_tokens", "missed tok/s", count),
        ("ghost_tokens", "ghost tok/s", count),
        ("up_bytes", "up /s", size),
        ("down_bytes", "down /s", size),
        ("evicted_blocks", "evicted /s", count),
    ):
        values = rates(rows, name)
        yield f"{what:<18} {style.spark(values, width)}  {show(values[-1])}"
    hits = [sum(row[f"{tier}_hit_tokens"] for tier in ("device", "host", "nvme")) for row in rows]
    asked = [hit + row["miss_tokens"] for hit, row in zip(hits, rows, strict=True)]
    ratio = [(b - a) / (d - c) if d > c else 0.0 for a, b, c, d in zip(hits, hits[1:], asked, asked[1:], strict=False)]
    yield f"{'hit rate':<18} {style.spark(ratio, width)}  {ratio[-1]:.1%}"


def rates(rows: list[dict[str, float]], name: str) -> list[float]:
    """Per second between neighbours; 0 where a counter began anew."""
    return [max(0.0, (b[name] - a[name]) / max(b["time_s"] - a["time_s"], 1e-9)) for a, b in pairwise(rows)]
