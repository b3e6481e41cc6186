"""The parts of `kvtier bench serve` that need no server: prompts from a trace, figures from answers, charts."""

from __future__ import annotations

import asyncio
import gzip
import json
import xml.etree.ElementTree as ET

import httpx
import pytest

from kvtier.engine.needle_tokenizer import needle_tokenizer
from kvtier.tiers.errors import ConfigError
from kvtier.tools.bench import serve
from kvtier.tools.bench.serving import chart, chats, figures, trace
from kvtier.tools.bench.serving.client import Answer, Load, ask
from kvtier.tools.bench.serving.trace import Recorded, prompts_of, read_trace


def answered(*first_s: float, **fields) -> list[Answer]:
    one = {"status": 200, "prompt_tokens": 10, "completion_tokens": 3, "is_right": True} | fields
    return [Answer(first_s=s, last_s=s + 0.2, **one) for s in first_s]


def test_the_trace_of_the_sources_shares_as_its_readme_says():
    recorded = read_trace(serve.TRACE)
    ids = [block for one in recorded for block in one.block_ids]
    assert (len(recorded), len(set(ids))) == (326, 3621)
    prompts = prompts_of(recorded, 16)
    assert sum(prompt.known_tokens for prompt in prompts) / sum(len(p.token_ids) for p in prompts) > 0.33
    assert [p.at_s for p in prompts] == sorted(p.at_s for p in prompts)


def test_prompts_share_what_their_block_ids_share_and_are_the_same_every_time():
    recorded = [Recorded(0, 1300, 40, (5, 6, 7)), Recorded(1, 1536, 1, (5, 6, 8)), Recorded(2, 520, 1, (5, 9))]
    first, second, third = prompts_of(recorded, 16)
    assert prompts_of(recorded, 16) == [first, second, third]
    assert [len(p.token_ids) for p in (first, second, third)] == [64 + 18 + 1, 96 + 1, 32 + 4 + 1]
    assert first.token_ids[:64] == second.token_ids[:64] and first.token_ids[64:80] != second.token_ids[64:80]
    assert [p.known_tokens for p in (first, second, third)] == [0, 64, 32]
    assert [p.max_tokens for p in (first, second, third)] == [3, 1, 1]
    for prompt in (first, second, third):  # the key asked for stands once in the blocks, before the answer
        *blocks, key = prompt.token_ids
        assert blocks.count(key) == 1 and blocks[blocks.index(key) + 1] == prompt.answer_id


def test_what_is_no_trace_is_refused(tmp_path):
    for content in (b"", b"plain", gzip.compress(b"{}\n"), gzip.compress(b"[1]\n"), gzip.compress(b"nothing\n")[:20]):
        path = tmp_path / "t.gz"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="--trace"):
            prompts_of(read_trace(path), 16)


def test_percentiles_are_values_that_were_measured():
    values = [float(i) for i in range(1, 101)]
    assert [figures.percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert figures.percentile([3.0], 0.5) == figures.percentile([3.0], 0.99) == 3.0


def test_refused_and_failed_answers_are_counted_and_not_measured():
    ours = Load([*answered(0.1, 0.3, cached_tokens=5, known_tokens=6), Answer(status=429), Answer(), Answer()], 2.0)
    rows = {row.metric: row for row in figures.rows_of("c", ours, Load(answered(0.4), 1.0))}
    assert (rows["refused with 429"].value, rows["failed"].value) == (1, 2)
    assert (rows["right answers"].value, rows["right answers"].reference_value) == (2, 5)
    assert rows["TTFT p50"].value == pytest.approx(100) and rows["TTFT p50"].ratio == pytest.approx(4)
    assert rows["TPOT p99"].value == pytest.approx(100)
    assert (rows["output tokens"].value, rows["requests"].value) == (3, 1)
    cached = rows["cached share of prompt tokens"]
    assert (cached.value, cached.reference_value, cached.ratio) == (50, 60, pytest.approx(5 / 6))
    with pytest.raises(RuntimeError, match="nothing was answered"):
        figures.rows_of("c", Load([Answer(status=429)], 1.0), ours)


def test_first_turns_are_measured_apart_from_later_ones():
    load = Load([*answered(1.0, turn=0), *answered(0.1, turn=1)], 1.0)
    rows = {row.metric: row.value for row in figures.rows_of("c", load, load)}
    assert rows["TTFT p50, later turns"] == pytest.approx(100) and rows["TTFT p50, first turn"] == pytest.approx(1000)


def answering(respond) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://server")


def events(*bodies) -> httpx.Response:
    return httpx.Response(200, text="".join(f"data: {json.dumps(one)}\n\n: keep-alive\n\n" for one in bodies))


def test_an_error_in_a_stream_and_a_broken_connection_are_failures():
    piece = {"choices": [{"index": 0, "text": "s1", "finish_reason": None}]}

    def broken(request):
        raise httpx.ReadError("gone")

    for respond in (lambda request: events(piece, {"error": {"message": "no"}}), broken):
        assert asyncio.run(ask(answering(respond), "/v1/completions", {})).status == 0
    refused = asyncio.run(ask(answering(lambda request: httpx.Response(429, json={"error": {}})), "/", {}))
    assert refused.status == 429


def test_a_chat_without_sessions_sends_all_of_it_and_never_the_same_salt():
    bodies, usage = [], {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {}}
    usage["prompt_tokens_details"] = {"cached_tokens": 0, "recomputed_tokens": 0}

    def respond(request):
        bodies.append(json.loads(request.content))
        return events({"choices": [{"delta": {"content": "s1"}, "finish_reason": "length"}], "usage": usage})

    made = chats.make_chats(needle_tokenizer(), "n", 2, 64, 3, 4)
    load = asyncio.run(chats.talk(answering(respond), made, 2, 4, has_sessions=False))
    assert [len(body["messages"]) for body in bodies] == [1, 1, 3, 3, 5, 5]
    assert len({body["cache_salt"] for body in bodies}) == 6
    assert sorted((a.turn, a.known_tokens) for a in load.done) == [(0, 0), (0, 0), (1, 10), (1, 10), (2, 10), (2, 10)]


def test_a_panel_is_a_drawing_with_every_point_and_escaped_words():
    panel = chart.Panel("a < b", "x", "y & z", ["1", "4"], {"one": [1.0, 30.0], "<two>": [2.0, 900.0]}, is_log=True)
    for drawn in (panel, chart.Panel("t", "x", "y", ["1"], {"one": [0.0]})):
        root = ET.fromstring(chart.svg(drawn))
        assert len(root.findall("circle")) == sum(len(values) for values in drawn.lines.values())
        for circle in root.findall("circle"):
            assert 0 <= float(circle.get("cx")) <= chart.WIDTH and 0 <= float(circle.get("cy")) <= chart.HEIGHT


def test_the_page_loads_nothing(tmp_path):
    row = figures.rows_of("c", Load(answered(0.1), 1.0), Load(answered(0.2), 1.0))[0]
    result = serve.report("serve", [row])
    chart.save_html(tmp_path / "deep" / "page.html", [chart.Panel("t", "x", "y", ["1"], {"one": [1.0]})], result)
    page = (tmp_path / "deep" / "page.html").read_text()
    assert "<svg" in page and "TTFT p50" in page and "2" in page
    assert not any(word in page for word in ("http", "<script", "<link", "@import", "url("))


def test_png_without_matplotlib_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(chart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        chart.check_png()


def test_trace_lengths_of_both_modules_agree():
    assert (serve.TRACE_BLOCK, serve.LEAST_BLOCK) == (trace.BLOCK_TOKENS, trace.LEAST_TOKENS)
