"""A pager's counters and levels as families of Prometheus; needs prometheus-client, which only servers of metrics load.

Counters, never ratios: readers divide. Labels are tier, direction and reason, so the number of series is bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .metric_names import METRICS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TIERS = ("device", "host", "nvme")


def of_counters(rows: list[dict[str, Any]], policy: str) -> Iterator[Any]:
    """What happened since the start, of the `counters` of a status."""

    def sums(name: str, *labels: str) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for row in rows:
            if row["name"] == name:
                found[tuple(row["labels"].get(label, "") for label in labels)] += row["value"]
        return found

    hits: dict[Any, float] = {(tier,): 0.0 for tier in TIERS} | sums("hit_tokens", "tier")
    yield counter("kvtier_hit_tokens", hits)
    ghosts, lost = sums("ghost_tokens")[()], sums("lost_tokens")[()]
    cold = max(0, sums("miss_tokens")[()] - ghosts)
    missed = {"cold": cold, "ghost": ghosts, "lost": lost}
    yield counter("kvtier_miss_tokens", missed)
    computed = {(): sums("computed_tokens")[()]}
    yield counter("kvtier_computed_tokens", computed)
    for name, of in (
        ("kvtier_transfer_bytes", "moved_bytes"),
        ("kvtier_transfer_blocks", "moved_blocks"),
        ("kvtier_transfer_seconds", "move_seconds"),
    ):
        moved = {
            (*direction.split("_to_"), reason): value
            for (direction, reason), value in sums(of, "direction", "reason").items()
        }
        yield counter(name, moved)
    evicted = {(tier, policy, reason): v for (tier, reason), v in sums("evicted_blocks", "tier", "reason").items()}
    yield counter("kvtier_evictions", evicted)
    yield counter("kvtier_prefetched_bytes", sums("prefetched_bytes", "tier", "outcome"))
    corrupt = sums("corrupt_blocks", "tier")
    yield counter("kvtier_checksum_failures", corrupt)
    yield counter("kvtier_rounded_again_blocks", {(): sums("rounded_again_blocks")[()]})
    yield counter("kvtier_unpackable_blocks", {(): sums("unpackable_blocks")[()]})
    sessions = {"parked": sums("parked_sessions")[()], "resumed": sums("resumed_sessions")[()]}
    yield counter("kvtier_sessions", sessions)


def of_tiers(tiers: dict[str, dict[str, Any]]) -> Iterator[Any]:
    """What is where now, of the `tiers` of a status."""
    levels = {}
    for tier, of in tiers.items():
        levels[tier, "free"] = max(0, of["capacity_bytes"] - of["staging_bytes"] - of["used_bytes"])
        levels[tier, "clean"] = max(0, of["used_bytes"] - of["dirty_bytes"] - of["in_flight_bytes"])
        levels[tier, "dirty"], levels[tier, "moving"] = of["dirty_bytes"], of["in_flight_bytes"]
        levels[tier, "pinned"], levels[tier, "staging"] = of["pinned_bytes"], of["staging_bytes"]
    yield gauge("kvtier_tier_bytes", levels)
    capacity = {tier: of["capacity_bytes"] for tier, of in tiers.items()}
    yield gauge("kvtier_tier_capacity_bytes", capacity)
    stored = {tier: of["stored_bytes"] for tier, of in tiers.items() if "stored_bytes" in of}
    yield gauge("kvtier_tier_stored_bytes", stored)


def counter(name: str, values: Any) -> Any:
    """A family of METRICS; `name` is without _total. `values` by label values, in the order of its labels."""
    told = METRICS[f"{name}_total"]
    return _filled(CounterMetricFamily(name, told.what, labels=told.labels), values)


def gauge(name: str, values: Any) -> Any:
    told = METRICS[name]
    return _filled(GaugeMetricFamily(name, told.what, labels=told.labels), values)


def _filled(family: Any, values: Any) -> Any:
    for key, value in dict(values).items():
        family.add_metric([key] if isinstance(key, str) else list(key), value)
    return family
