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
from prometheus_client.core import InfoMetricFamily

from ...pager.metric_names import METRICS
from ...pager.metrics import CONTENT_TYPE, counter, gauge, of_counters, of_tiers

__all__ = ["CONTENT_TYPE", "Metrics"]

if TYPE_CHECKING:
    from .service import Asked, Service

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

        def histogram(name: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, METRICS[name].what, registry=self._registry, buckets=buckets)

        self._ttft = histogram("kvtier_time_to_first_token_seconds", _LONG)
        self._tpot = histogram("kvtier_time_per_output_token_seconds", _SHORT)
        self._queue = histogram("kvtier_queue_wait_seconds", _LONG)

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
        yield from of_counters(status["counters"], self._service.engine.pager.policy)
        yield from of_tiers(status["tiers"])
        yield from self._of_queues(status)
        yield counter("kvtier_requests", self._requests)
        yield counter("kvtier_tokens", self._tokens)
        yield counter("kvtier_stall_seconds", self._stalls)
        yield counter("kvtier_prefill_saved_seconds", self._saved)
        yield counter("kvtier_backpressure", self._backpressure)
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
        yield gauge("kvtier_queue_depth", depths)
        oldest_s = max((scheduler.clock() - request.waiting_since_s for request in waiting), default=0.0)
        yield gauge("kvtier_queue_oldest_seconds", {"waiting": oldest_s})
        levels = {"sessions": status["sessions"], "sequences": status["sequences"]}
        yield gauge("kvtier_held", levels)
        yield gauge("kvtier_pinned_tokens", {(): service.pins.tokens})
        yield gauge("kvtier_ready", {(): int(service.is_ready)})
        preempted = {(): scheduler.num_preempted}
        yield counter("kvtier_preemptions", preempted)
