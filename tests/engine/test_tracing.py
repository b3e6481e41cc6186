"""OpenTelemetry: a request is a span, the copies that its blocks waited for lie below it, and nobody pays who did not ask."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from kvtier import SamplingParams
from kvtier.engine import tracing
from kvtier.engine.tracing import trace_requests
from kvtier.tiers.errors import ConfigError
from kvtier.tools import cli

from .test_engine import open_engine
from .test_families import prompts, tiny

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode


@pytest.fixture
def spans():
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    exporter.provider = provider
    return exporter


def asked_again(engine, exporter: InMemorySpanExporter):
    """A prompt whose blocks went down to nvme is asked again; the spans of the second time."""
    prompt = prompts()[3] * 3
    engine.session("a").send(prompt, SamplingParams(max_tokens=2))
    engine.session("a").park()
    for number in range(8):
        engine.generate([[number + 1] * 150], SamplingParams(max_tokens=1))
    exporter.clear()
    engine.generate([prompt], SamplingParams(max_tokens=2))
    return exporter.get_finished_spans()


def test_a_request_is_a_span_with_its_block_waits_below_it(tmp_path, spans):
    before_ns = time.time_ns()
    with open_engine(tiny("llama"), 14, nvme_path=tmp_path / "s", nvme_bytes="64MiB") as engine:
        trace_requests(engine, spans.provider)
        found = asked_again(engine, spans)
        record = engine.pager._core.observer.requests[-1]
    (request,) = [span for span in found if span.name == "kvtier.request"]
    copies = [span for span in found if span is not request]
    assert {span.name for span in copies} == {"kvtier.blocks nvme_to_host", "kvtier.blocks host_to_device"}
    for span in copies:
        assert span.parent.span_id == request.context.span_id and span.context.trace_id == request.context.trace_id
        assert before_ns < request.start_time <= span.start_time <= span.end_time <= request.end_time < time.time_ns()
    for way, nbytes in record.copied_bytes.items():
        told = sum(s.attributes["kvtier.bytes"] for s in copies if s.name == f"kvtier.blocks {way}")
        assert told == nbytes > 0
    (first,) = request.events
    assert first.name == "first_token"
    assert (first.timestamp - request.start_time) / 1e9 == pytest.approx(record.lines_s["ttft_s"], abs=1e-6)
    facts = request.attributes
    assert facts["kvtier.namespace"] == "default" and "kvtier.session" not in facts
    phases = [seconds for name, seconds in record.lines_s.items() if name != "ttft_s"]
    assert facts["kvtier.ttft_s"] == pytest.approx(sum(phases)) and facts["kvtier.wait_for_blocks_s"] >= 0
    assert facts["kvtier.prompt_tokens"] == record.usage["prompt_tokens"]


def test_a_request_that_failed_is_an_error_and_each_request_is_a_trace_of_its_own(spans):
    with open_engine(tiny("llama"), 30) as engine:
        trace_requests(engine, spans.provider)
        engine.generate(prompts()[:2], SamplingParams(max_tokens=2))
        gone = engine.request(prompts()[1], SamplingParams(max_tokens=50))
        engine.scheduler.add(gone)
        for _ in range(3):
            engine.step()
        gone.is_cancelled = True
        while not gone.is_done:
            engine.step()
    found = [span for span in spans.get_finished_spans() if span.name == "kvtier.request"]
    assert len({span.context.trace_id for span in found}) == len(found) == 3
    assert [span.status.status_code for span in found] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]
    assert found[-1].attributes["kvtier.outcome"] == "cancelled"


def test_nobody_pays_who_did_not_ask(spans):
    with open_engine(tiny("llama"), 30) as engine:
        trace_requests(engine, spans.provider)
        engine.pager.watch_requests(None)
        engine.generate(prompts()[:1], SamplingParams(max_tokens=2))
    assert spans.get_finished_spans() == ()
    code = "import sys, kvtier.engine.tracing, kvtier.pager.pager; print('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/").stdout == "False\n"


def test_without_the_library_it_is_refused_with_its_name(monkeypatch, capsys):
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"kvtier\[otel\]"):
        tracing.check_tracing()
    assert cli.main(["serve", "--needle", "--otel"]) == 2
    assert "pip install 'kvtier[otel]'" in capsys.readouterr().err
