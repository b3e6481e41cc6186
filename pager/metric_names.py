"""Every Prometheus metric of ours: name, kind, labels, unit and meaning. The one source: exporters make their families from
it, docs/metrics.md is its table, and dashboard and alert rules are tested against it.

Counters and levels, never ratios: readers divide. Base units. No label holds a session, a request or a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "info"]
Source = Literal["pager", "server", "daemon", "server, daemon"]  # pager: wherever one is behind the exporter


@dataclass(frozen=True, slots=True)
class Metric:
    """One family as it is scraped: counters end in _total, histograms have _bucket, _sum and _count."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    unit: str
    what: str
    source: Source


_ALL = (
    Metric(
        "kvtier_hit_tokens_total",
        "counter",
        ("tier",),
        "tokens",
        "Prompt tokens found, by tier at match time.",
        "pager",
    ),
    Metric(
        "kvtier_miss_tokens_total",
        "counter",
        ("reason",),
        "tokens",
        "Not found: cold, evicted before (ghost), lost.",
        "pager",
    ),
    Metric("kvtier_computed_tokens_total", "counter", (), "tokens", "Tokens that the model ran over.", "pager"),
    Metric(
        "kvtier_transfer_bytes_total",
        "counter",
        ("source", "target", "reason"),
        "bytes",
        "Moved between tiers.",
        "pager",
    ),
    Metric(
        "kvtier_transfer_blocks_total",
        "counter",
        ("source", "target", "reason"),
        "blocks",
        "Moved between tiers.",
        "pager",
    ),
    Metric(
        "kvtier_transfer_seconds_total",
        "counter",
        ("source", "target", "reason"),
        "seconds",
        "Of moves, from submission to completion; moves overlap.",
        "pager",
    ),
    Metric(
        "kvtier_evictions_total", "counter", ("tier", "policy", "reason"), "blocks", "Copies that left a tier.", "pager"
    ),
    Metric(
        "kvtier_prefetched_bytes_total",
        "counter",
        ("tier", "outcome"),
        "bytes",
        "Brought up before anybody asked: started, and of these useful, late, wasted.",
        "pager",
    ),
    Metric(
        "kvtier_checksum_failures_total",
        "counter",
        ("tier",),
        "blocks",
        "Dropped because their bytes changed.",
        "pager",
    ),
    Metric(
        "kvtier_rounded_again_blocks_total",
        "counter",
        (),
        "blocks",
        "Packed for a tier below from values that had been rounded before.",
        "pager",
    ),
    Metric(
        "kvtier_unpackable_blocks_total",
        "counter",
        (),
        "blocks",
        "Kept in full precision below: a format cannot hold their values.",
        "pager",
    ),
    Metric("kvtier_sessions_total", "counter", ("verb",), "sessions", "Parked and resumed.", "pager"),
    Metric(
        "kvtier_tier_bytes",
        "gauge",
        ("tier", "state"),
        "bytes",
        "By state; pinned ones are also clean or dirty.",
        "pager",
    ),
    Metric("kvtier_tier_capacity_bytes", "gauge", ("tier",), "bytes", "Size of a tier.", "pager"),
    Metric(
        "kvtier_tier_stored_bytes",
        "gauge",
        ("tier",),
        "bytes",
        "On disk, as codecs made them; the other two count whole blocks.",
        "pager",
    ),
    Metric("kvtier_requests_total", "counter", ("endpoint", "outcome"), "requests", "By how they ended.", "server"),
    Metric("kvtier_tokens_total", "counter", ("kind",), "tokens", "Of prompts and completions.", "server"),
    Metric("kvtier_stall_seconds_total", "counter", ("cause",), "seconds", "Where time to first token went.", "server"),
    Metric(
        "kvtier_prefill_saved_seconds_total",
        "counter",
        ("tier",),
        "seconds",
        "Prefill that hits made needless.",
        "server",
    ),
    Metric("kvtier_backpressure_total", "counter", ("reason",), "requests", "Refused or put off.", "server"),
    Metric("kvtier_preemptions_total", "counter", (), "requests", "Requests that made room for others.", "server"),
    Metric("kvtier_queue_depth", "gauge", ("queue",), "entries", "Waiting, active, transfers, http.", "server"),
    Metric("kvtier_queue_oldest_seconds", "gauge", ("queue",), "seconds", "Age of the oldest entry.", "server"),
    Metric("kvtier_held", "gauge", ("kind",), "entries", "Sessions known and sequences open.", "server"),
    Metric("kvtier_pinned_tokens", "gauge", (), "tokens", "Kept by clients.", "server"),
    Metric("kvtier_ready", "gauge", (), "0 or 1", "1 while requests are taken.", "server, daemon"),
    Metric(
        "kvtier_time_to_first_token_seconds",
        "histogram",
        (),
        "seconds",
        "From submission to the first token.",
        "server",
    ),
    Metric(
        "kvtier_time_per_output_token_seconds",
        "histogram",
        (),
        "seconds",
        "Between tokens, per output, on average.",
        "server",
    ),
    Metric(
        "kvtier_queue_wait_seconds",
        "histogram",
        (),
        "seconds",
        "Part of the time to first token spent in queues.",
        "server",
    ),
    Metric("kvtier_daemon_connections", "gauge", (), "clients", "Attached now.", "daemon"),
    Metric("kvtier_daemon_attached_processes", "gauge", (), "processes", "Whose leases are held.", "daemon"),
    Metric("kvtier_daemon_left_processes", "gauge", (), "processes", "Connection gone, process alive.", "daemon"),
    Metric("kvtier_daemon_waiting_requests", "gauge", (), "requests", "Without an answer yet.", "daemon"),
    Metric("kvtier_daemon_pinned_slots", "gauge", (), "slots", "Leased or reserved by clients.", "daemon"),
    Metric("kvtier_daemon_uptime_seconds", "gauge", (), "seconds", "Since the start.", "daemon"),
    Metric("kvtier_daemon_models", "gauge", (), "models", "That are open.", "daemon"),
    Metric("kvtier_daemon_stale_requests_total", "counter", (), "requests", "Of an epoch that is over.", "daemon"),
    Metric(
        "kvtier_namespace_bytes", "gauge", ("namespace", "tier"), "bytes", "Of namespaces that have a quota.", "daemon"
    ),
    Metric("kvtier_build_info", "info", ("version",), "1", "What runs.", "server, daemon"),
)
METRICS = {metric.name: metric for metric in _ALL}


def markdown() -> str:
    """The table of docs/metrics.md."""
    lines = ["| name | kind | labels | unit | what | exported by |", "|---|---|---|---|---|---|"]
    for one in _ALL:
        labels = ", ".join(f"`{label}`" for label in one.labels) or "-"
        lines.append(f"| `{one.name}` | {one.kind} | {labels} | {one.unit} | {one.what} | {one.source} |")
    return "\n".join(lines) + "\n"
