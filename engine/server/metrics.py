"""/metrics: the pager's counters and levels as they are, and histograms of what clients waited for.

Counters, never ratios: readers divide. Labels are tier, direction and reason; no tenant and no session, so the number of
series is bounded.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

if TYPE_CHECKING:
    from .service import Asked, Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TIERS = {"device": "device_tokens", "host": "host_tokens", "nvme": "disk_tokens"}
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Of one service. `finished`, `refused` and `text` are of the event loop's thread; `backpressure` of any."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry(auto_describe=False)
        self._requests: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._stalls: defaultdict[str, float] = defaultdict(float)
        self._saved: defaultdict[str, float] = defaultdict(float)
        self._backpressure: Counter[str] = Counter()
        self._registry.register(self)  # type: ignore[arg-type]

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, registry=self._registry, buckets=buckets)

        self._ttft = histogram("kvtier_time_to_first_token_seconds", "From submission to the first token.", _LONG)
        self._tpot = histogram(
            "kvtier_time_per_output_token_seconds", "Between tokens, per output, on average.", _SHORT
        )
        self._queue = histogram("kvtier_queue_wait_seconds", "Part of the time to first token spent in queues.", _LONG)

    # ------------------------------------------------------------------ what happened
    def finished(self, asked: Asked) -> None:
        ends = asked.ends
        for end in ends[:: asked.params.n]:
            usage, ledger = end.output.usage, end.output.ledger
            self._tokens["prompt"] += usage.prompt_tokens
            self._ttft.observe(usage.ttft_s)
            self._queue.observe(ledger.get("queued", 0.0))
            for cause, seconds in ledger.items():
                if cause not in ("ttft_s", "unexplained"):
                    self._stalls[cause] += seconds
            per_token_s = self._service.engine.scheduler.prefill_s_per_token
            for tier, name in _TIERS.items():
                self._saved[tier] += getattr(usage, name) * per_token_s
        for end in ends:
            count = end.output.usage.completion_tokens
            self._tokens["completion"] += count
            if count > 1:
                self._tpot.observe((end.last_s - end.first_s) / (count - 1))

    def answered(self, endpoint: str, outcome: str) -> None:
        self._requests[endpoint, outcome] += 1

    def backpressure(self, reason: str) -> None:
        self._backpressure[reason] += 1

    # ------------------------------------------------------------------ what is read
    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        status = self._service.engine.pager.status()
        yield from _of_counters(status["counters"], self._service.engine.pager.policy)
        yield from _of_tiers(status["tiers"])
        yield from self._of_queues(status)
        yield _counter("kvtier_requests", "Requests by how they ended.", ("endpoint", "outcome"), self._requests)
        yield _counter("kvtier_tokens", "Prompt and completion tokens.", ("kind",), self._tokens)
        yield _counter("kvtier_stall_seconds", "Where time to first token went.", ("cause",), self._stalls)
        yield _counter("kvtier_prefill_saved_seconds", "Prefill that hits made needless.", ("tier",), self._saved)
        yield _counter("kvtier_backpressure", "Refused or put off, by reason.", ("reason",), self._backpressure)
        yield InfoMetricFamily("kvtier_build", "What runs.", {"version": version("kvtier")})

    def _of_queues(self, status: dict[str, Any]) -> Iterator[Any]:
        scheduler, service = self._service.engine.scheduler, self._service
        waiting = list(scheduler.waiting)
        depths = {
            "waiting": len(waiting),
            "active": len(scheduler.active),
            "transfers": status["transfers_in_flight"],
            "http": service.gate.num_inside,
        }
        yield _gauge("kvtier_queue_depth", "Entries.", ("queue",), depths)
        oldest_s = max((scheduler.clock() - request.waiting_since_s for request in waiting), default=0.0)
        yield _gauge("kvtier_queue_oldest_seconds", "Age of the oldest entry.", ("queue",), {"waiting": oldest_s})
        levels = {"sessions": status["sessions"], "sequences": status["sequences"]}
        yield _gauge("kvtier_held", "Sessions known and sequences open.", ("kind",), levels)
        yield _gauge("kvtier_pinned_tokens", "Tokens that clients keep.", (), {(): service.pins.tokens})
        yield _gauge("kvtier_ready", "1 while requests are taken.", (), {(): int(service.is_ready)})
        preempted = {(): scheduler.num_preempted}
        yield _counter("kvtier_preemptions", "Requests that made room for others.", (), preempted)


def _of_counters(rows: list[dict[str, Any]], policy: str) -> Iterator[Any]:
    def sums(name: str, *labels: str) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for row in rows:
            if row["name"] == name:
                found[tuple(row["labels"].get(label, "") for label in labels)] += row["value"]
        return found

    hits: dict[Any, float] = {(tier,): 0.0 for tier in _TIERS} | sums("hit_tokens", "tier")
    yield _counter("kvtier_hit_tokens", "Prompt tokens found, by tier at match time.", ("tier",), hits)
    ghosts, lost = sums("ghost_tokens")[()], sums("lost_tokens")[()]
    cold = max(0, sums("miss_tokens")[()] - ghosts)
    missed = {"cold": cold, "ghost": ghosts, "lost": lost}
    yield _counter("kvtier_miss_tokens", "Tokens not found: never held, evicted before, lost.", ("reason",), missed)
    computed = {(): sums("computed_tokens")[()]}
    yield _counter("kvtier_computed_tokens", "Tokens that the model ran over.", (), computed)
    for name, of, what in (
        ("kvtier_transfer_bytes", "moved_bytes", "Bytes moved between tiers."),
        ("kvtier_transfer_blocks", "moved_blocks", "Blocks moved between tiers."),
        ("kvtier_transfer_seconds", "move_seconds", "Seconds of moves, from submission to completion."),
    ):
        moved = {
            (*direction.split("_to_"), reason): value
            for (direction, reason), value in sums(of, "direction", "reason").items()
        }
        yield _counter(name, what, ("source", "target", "reason"), moved)
    evicted = {(tier, policy, reason): v for (tier, reason), v in sums("evicted_blocks", "tier", "reason").items()}
    yield _counter("kvtier_evictions", "Blocks that left a tier.", ("tier", "policy", "reason"), evicted)
    corrupt = sums("corrupt_blocks", "tier")
    yield _counter("kvtier_checksum_failures", "Blocks dropped because their bytes changed.", ("tier",), corrupt)
    sessions = {"parked": sums("parked_sessions")[()], "resumed": sums("resumed_sessions")[()]}
    yield _counter("kvtier_sessions", "Sessions parked and resumed.", ("verb",), sessions)


def _of_tiers(tiers: dict[str, dict[str, Any]]) -> Iterator[Any]:
    levels = {}
    for tier, of in tiers.items():
        levels[tier, "free"] = max(0, of["capacity_bytes"] - of["staging_bytes"] - of["used_bytes"])
        levels[tier, "clean"] = max(0, of["used_bytes"] - of["dirty_bytes"] - of["in_flight_bytes"])
        levels[tier, "dirty"], levels[tier, "moving"] = of["dirty_bytes"], of["in_flight_bytes"]
        levels[tier, "pinned"], levels[tier, "staging"] = of["pinned_bytes"], of["staging_bytes"]
    what = "Bytes by state; pinned ones are also clean or dirty."
    yield _gauge("kvtier_tier_bytes", what, ("tier", "state"), levels)
    capacity = {tier: of["capacity_bytes"] for tier, of in tiers.items()}
    yield _gauge("kvtier_tier_capacity_bytes", "Size of a tier.", ("tier",), capacity)


def _counter(name: str, what: str, labels: tuple[str, ...], values: Any) -> Any:
    return _filled(CounterMetricFamily(name, what, labels=labels), values)


def _gauge(name: str, what: str, labels: tuple[str, ...], values: Any) -> Any:
    return _filled(GaugeMetricFamily(name, what, labels=labels), values)


def _filled(family: Any, values: Any) -> Any:
    for key, value in dict(values).items():
        family.add_metric([key] if isinstance(key, str) else list(key), value)
    return family
