"""OpenTelemetry spans of answered requests: one for the request, below it one for every copy that its blocks waited for.

Spans are made when a request has ended, from what the pager's decision ring and the engine's ledger hold anyhow, with the
times at which things happened. So tracing costs nothing while a request runs, and nothing at all where nobody asked for
it. Only the API is used: which provider exports where is the process's business. No text, token id or key is in a span.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..tiers.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer, TracerProvider

    from ..pager.inspection.observer import RequestRecord
    from ..pager.inspection.requests import Copy
    from .engine import Engine

REQUEST, COPY = "kvtier.request", "kvtier.blocks"  # names of spans; a copy's has its way behind it
FIRST_TOKEN = "first_token"
_FAILED = ("error", "cancelled", "deadline")


def check_tracing() -> None:
    """Raises ConfigError where the API is missing."""
    if find_spec("opentelemetry") is None:
        raise ConfigError("OpenTelemetry spans need its API: pip install 'kvtier[otel]'")


def trace_requests(
    engine: Engine, provider: TracerProvider | None = None, *, wall_ns: Callable[[], int] = time.time_ns
) -> None:
    """Make spans of every request that this engine answers from now on; None takes the process's provider.

    Raises: ConfigError where the API is missing.
    """
    check_tracing()
    from importlib.metadata import version

    from opentelemetry import trace

    tracer = trace.get_tracer("kvtier", version("kvtier"), tracer_provider=provider)
    engine.pager.watch_requests(
        lambda record, copies, ended_s: _export(tracer, record, copies, wall_ns() - _ns(ended_s), ended_s)
    )


def _export(tracer: Tracer, record: RequestRecord, copies: list[Copy], zero_ns: int, ended_s: float) -> None:
    """`zero_ns`: the time of day at which the pager's clock was 0."""
    from opentelemetry.trace import SpanKind, set_span_in_context

    span = tracer.start_span(
        REQUEST, kind=SpanKind.INTERNAL, attributes=_facts(record), start_time=zero_ns + _ns(record.started_s)
    )
    span.add_event(FIRST_TOKEN, timestamp=zero_ns + _ns(record.started_s + record.lines_s["ttft_s"]))
    inside = set_span_in_context(span)
    for copy in copies:
        facts = {"kvtier.source": copy.way.split("_to_")[0], "kvtier.target": copy.way.split("_to_")[1]}
        child = tracer.start_span(
            f"{COPY} {copy.way}",
            context=inside,
            attributes={**facts, "kvtier.bytes": copy.nbytes},
            start_time=zero_ns + _ns(copy.started_s),
        )
        child.end(zero_ns + _ns(copy.ended_s))
    _tell_outcome(span, record.outcome)
    span.end(zero_ns + _ns(ended_s))


def _facts(record: RequestRecord) -> dict[str, Any]:
    """The ledger and the usage, by name; who asked, as its client and the operator know it."""
    facts: dict[str, Any] = {"kvtier.request": record.name or f"req-{record.number}"}
    facts |= {"kvtier.namespace": record.namespace, "kvtier.outcome": record.outcome}
    if record.session_id is not None:
        facts["kvtier.session"] = record.session_id
    facts |= {f"kvtier.{name if name == 'ttft_s' else name + '_s'}": s for name, s in record.lines_s.items()}
    return facts | {f"kvtier.{name}": value for name, value in record.usage.items() if name != "ttft_s"}


def _tell_outcome(span: Span, outcome: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    if outcome in _FAILED:
        span.set_status(Status(StatusCode.ERROR, outcome))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
