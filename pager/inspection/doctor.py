"""Doctor: what is wrong with a running pager, from what it counted, and what to change.

Each rule looks at one cause and tells what it saw with figures; a rule that is not sure says nothing. Rules read the
books, the decision ring and (one of them) the machine; they change nothing. Thresholds stand beside the rule that uses
them, and each rule has a test that plants its cause in a real pager, and in a real daemon. Rules that only a daemon has are in
doctor_clients.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...tiers.layout import format_bytes
from ..states import PageState, SlotState
from .decisions import thrash
from .doctor_clients import hogging_clients, starved_clients
from .finding import RECENT_S, SEVERITIES, Finding, Rule, quiet_s, recent
from .neighbours import other_stores
from .observer import HEAD_BLOCKS, Lookup
from .places import bytes_by_place, owners
from .views import shown_tag

if TYPE_CHECKING:
    from ..core import Core
    from ..group import BlockGroup


def doctor(core: Core) -> dict[str, Any]:
    """All findings, worst first."""
    return {"findings": [asdict(finding) for finding in findings(core)]}


def findings(core: Core, *, quick: bool = False) -> list[Finding]:
    """`quick`: without the rules that read files of the machine."""
    with core.lock:
        found = [finding for rule in QUICK for finding in rule(core)]
    if not quick:
        found += [finding for rule in SLOW for finding in rule(core)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


# ---------------------------------------------------------------------- tiers
def undersized_tier(core: Core) -> Iterator[Finding]:
    """Evicted for want of room and asked for again: at least 16 blocks and a fifth of what missed."""
    seen = thrash(core, since_s=RECENT_S)
    lost = Counter[str]()
    for row in seen["by_tier"]:
        if row["reason"] in ("pressure", "no_room_below"):
            lost[row["tier"]] += row["tokens"]
    tokens, missed = sum(lost.values()), seen["missed_tokens"]
    if tokens < 16 * core.block_size or tokens < missed / 5:
        return
    refused = int(core.counters.get("refused_blocks", tier="nvme", reason="budget"))
    if refused and lost["nvme"] <= tokens / 2:  # most never got there
        yield _budget_finding(core, tokens - lost["nvme"], missed, refused)
        return
    tier = "nvme" if core.nvme is not None else "host"
    yield Finding(
        f"{tier} tier too small",
        "warn",
        f"{tokens:,} of {missed:,} missed tokens had been evicted for want of room in the last {RECENT_S / 60:.0f} min",
        f"raise {tier}_bytes (`pager-inspect advise` says what it would buy)"
        + ("" if core.nvme is not None else ", or give it an nvme_path"),
        "thrash",
    )


def _budget_finding(core: Core, tokens: int, missed: int, refused: int) -> Finding:
    slots = sum(core.nvme.num_slots(group.index) for group in core.groups) if core.nvme is not None else 0
    used = sum(int(group.directory.nvme_valid.sum()) for group in core.groups)
    return Finding(
        "write budget of nvme too small",
        "warn",
        f"{tokens:,} of {missed:,} missed tokens were dropped above nvme in the last {RECENT_S / 60:.0f} min; the write budget "
        f"has refused {refused:,} blocks since the start, {used:,} of {slots:,} slots are in use",
        "raise nvme_write_bytes_per_s or nvme_write_bytes_per_day, or host_bytes to keep them above",
        "thrash",
    )


def rereading(core: Core) -> Iterator[Finding]:
    """The same blocks come from nvme again and again: read twice or more, and more than twice the host tier in all."""
    if core.nvme is None:
        return
    ring = core.observer.events
    batches = recent(core, "read")
    tags = [ring.blocks_of(batch)[1] for batch in batches]
    if not tags:
        return
    _, counts = np.unique(np.concatenate(tags), return_counts=True)
    slots, again = sum(len(group.host) for group in core.groups), int((counts - 1).sum())
    if counts.sum() >= 2 * slots and again >= counts.sum() / 2:
        yield Finding(
            "host tier too small",
            "warn",
            f"{again:,} of {int(counts.sum()):,} blocks read from nvme lately had been read before; the host tier has "
            f"{slots:,} slots",
            "raise host_bytes",
            "advise",
        )


def starved_writeback(core: Core) -> Iterator[Finding]:
    """Dirty pages fill the device tier to its low mark, and nothing takes them or was written down for a second."""
    for group in core.groups:
        dirty, total = int((group.pages.state == PageState.DIRTY).sum()), len(group.pages)
        clean = group.pages.block[(group.pages.state == PageState.RESIDENT) & group.pages.idle()]
        ready = group.pages.num_free + len(group.unpinned_by_ttl(clean))
        if dirty < 0.5 * total or ready >= max(1, int(total * core.config.low_watermark)):
            continue
        room, still_s = group.leaving.host_room(), quiet_s(core, group, "demoted")
        if room and still_s < 1.0:
            continue
        yield Finding(
            "write-back starved",
            "warn",
            f"{dirty} of {total} pages of group {group.layout.name!r} are not written down; the host tier can take {room} "
            f"blocks ({_host_holders(group)}), last write-back {still_s:.0f} s ago",
            "raise host_bytes, shorten pins, or mend what keeps the tier below from taking blocks",
            "blocks --state dirty",
        )


def _host_holders(group: BlockGroup) -> str:
    host, d = group.host, group.directory
    blocks = host.block[host.state == SlotState.VALID]
    pinned, held = int((d.pinned_until[blocks] > group.clock()).sum()), int((host.holds > 0).sum())
    return f"{len(host)} slots, {pinned} pinned, {held} being read"


def hogging(core: Core) -> Iterator[Finding]:
    """One of several open sequences holds most of the device tier, and pages were taken away in the last minute."""
    sizes = [(bytes_by_place(core, owner)["device"], owner) for owner in owners(core) if owner.seq is not None]
    capacity = sum(len(group.pages) * group.layout.block_bytes for group in core.groups)
    largest = max(sizes, key=lambda pair: pair[0], default=None)
    if largest is None or len(sizes) < 2 or largest[0] < 0.6 * capacity:
        return
    if not len(recent(core, "evicted", tier="device", within_s=60.0)):
        return
    size, owner = largest
    yield Finding(
        "one session hogs the device tier",
        "warn",
        f"{owner.name} (namespace {owner.namespace}) holds {format_bytes(size)} of {format_bytes(capacity)}; "
        f"{len(sizes) - 1} other open ones share the rest",
        "park it, give it a lower priority, or raise device_bytes",
        f"session {owner.name}",
    )


def quota_hit(core: Core) -> Iterator[Finding]:
    """A namespace holds all that it may. Of the host tier over nvme that is how it is meant: what leaves goes down."""
    refused, smallest = len(recent(core, "refused")), {"host": 0, "nvme": 0}
    smallest["host"] = min(group.layout.block_bytes for group in core.groups)
    smallest["nvme"] = min(group.cold_bytes for group in core.groups)
    for name, quota in core.quotas.to_dict().items():
        for tier, used in (("host", quota["host_used_bytes"]), ("nvme", quota["used_bytes"])):
            ceiling = quota.get(f"{tier}_ceiling")
            if ceiling is None or used + smallest[tier] <= ceiling:
                continue
            yield Finding(
                "quota hit",
                "info" if tier == "host" and core.nvme is not None else "warn",
                f"namespace {name!r} holds {format_bytes(used)} of its {format_bytes(ceiling)} on {tier}; "
                f"{refused} batches had blocks refused lately",
                f"raise {tier}_ceiling of namespace {name!r} or forget sessions of it",
                "sessions",
            )


# ---------------------------------------------------------------------- disk and memory
def slow_disk(core: Core) -> Iterator[Finding]:
    """Half of the moves to or from nvme took over 20 ms and ran below 100 MB/s; at least four of them."""
    for kind, verb in (("read", "reads from"), ("written", "writes to")):
        batches = recent(core, kind)
        seconds = np.maximum(batches["time_s"] - batches["started_s"], 1e-9)
        if len(batches) < 4 or np.median(seconds) < 0.02 or np.median(batches["nbytes"] / seconds) > 100e6:
            continue
        yield Finding(
            "slow disk",
            "warn",
            f"{verb} {core.config.nvme_path}: {np.median(seconds) * 1e3:.0f} ms each, "
            f"{format_bytes(int(np.median(batches['nbytes'] / seconds)))}/s, over {len(batches)} lately",
            "`kvtier doctor --path` measures the disk; put the store on local NVMe, or raise host_bytes so that less is read",
            "trace --types read,written",
        )


def refused_writes(core: Core) -> Iterator[Finding]:
    if core.nvme is not None and not all(group.can_write_nvme for group in core.groups):
        yield Finding(
            "nvme takes no writes",
            "crit",
            f"{core.config.nvme_path or core.nvme.name}: {core.nvme.last_write_error or 'unknown error'}; tried again later",
            "free space, check permissions and the disk's log; sessions parked meanwhile are not durable",
            "check",
        )


def corrupt_blocks(core: Core) -> Iterator[Finding]:
    bad = int(core.counters.get("corrupt_blocks"))
    if bad:
        yield Finding(
            "corrupt blocks",
            "crit",
            f"{bad} blocks were read back wrong since the start; they were dropped and not served",
            "check the disk's log and memory; `kvtier store check` reads a whole store at rest",
            "check",
        )


def unpinned_memory(core: Core) -> Iterator[Finding]:
    if not core.backend.pinned:
        needs_it = core.backend.name == "cuda"
        yield Finding(
            "unpinned memory",
            "warn" if needs_it else "info",
            f"the host tier is not pinned (backend {core.backend.name})"
            + ("; copies to and from the device go through a bounce buffer" if needs_it else "; no GPU needs it here"),
            "raise the memlock limit (ulimit -l, LimitMEMLOCK=) and set require_pinned=true"
            if needs_it
            else "nothing to do",
            "status",
        )


def two_stores(core: Core) -> Iterator[Finding]:
    """Another live store on the same file system shares its bandwidth and its free space."""
    if core.config.nvme_path is None:
        return
    others = other_stores(Path(core.config.nvme_path))
    if others:
        shown = ", ".join(f"{path} (pid {pid})" for pid, path in others[:3])
        yield Finding(
            "two stores on one disk",
            "warn",
            f"{len(others)} more open store(s) on the file system of {core.config.nvme_path}: {shown}",
            "give each store a disk of its own, or set nvme_bytes of each so that together they fit",
            "status",
        )


# ---------------------------------------------------------------------- prompts
def changed_template(core: Core) -> Iterator[Finding]:
    """Prompts of a namespace began alike, and for the last eight look-ups begin alike in another way."""
    by_namespace: dict[str, list[Lookup]] = {}
    for lookup in core.observer.lookups:
        if lookup.session_id is None and not lookup.is_turn and len(lookup.head):
            by_namespace.setdefault(lookup.namespace, []).append(lookup)
    for namespace, lookups in by_namespace.items():
        before, after = lookups[-40:-8], lookups[-8:]
        if len(before) < 8:
            continue
        for depth in range(HEAD_BLOCKS):
            old, new = _usual(before, depth), _usual(after, depth)
            if old is None or new is None:
                break
            if old != new and not any(_tag(lookup, depth) == new for lookup in before):
                yield _template_finding(core, namespace, depth, old, new, after)
                break


def _usual(lookups: list[Lookup], depth: int) -> int | None:
    """The tag that at least three quarters of these prompts have at a depth."""
    tag, count = Counter(_tag(lookup, depth) for lookup in lookups).most_common(1)[0]
    return tag if tag is not None and count >= 0.75 * len(lookups) else None


def _tag(lookup: Lookup, depth: int) -> int | None:
    return int(lookup.head[depth]) if depth < len(lookup.head) else None


def _template_finding(core: Core, namespace: str, depth: int, old: int, new: int, after: list[Lookup]) -> Finding:
    age_s = core.clock() - after[0].time_s
    missed = sum(lookup.tokens - lookup.hit_tokens for lookup in after)
    return Finding(
        "key mismatch after a changed template",
        "warn",
        f"prompts of namespace {namespace!r} have another block {depth} (tokens from {depth * core.block_size}) since "
        f"{age_s:.0f} s: key {shown_tag(new)}, was {shown_tag(old)}; what is cached behind the old one no longer matches, "
        f"{missed:,} tokens of the last {len(after)} prompts missed",
        "look for a changed chat template, system prompt, date or tool list; put what changes behind what stays",
        "prefix FILE",
    )


QUICK: tuple[Rule, ...] = (
    refused_writes,
    corrupt_blocks,
    undersized_tier,
    rereading,
    starved_writeback,
    starved_clients,
    hogging,
    hogging_clients,
    quota_hit,
    slow_disk,
    changed_template,
    unpinned_memory,
)
SLOW: tuple[Rule, ...] = (two_stores,)
