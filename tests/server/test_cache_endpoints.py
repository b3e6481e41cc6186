"""Warm, pins, stats, cache_control; and /metrics, which counts what they and everybody else do."""

from __future__ import annotations

import json
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvtier.engine.server.pins import Pins

from .running import BLOCK, WORDS, serving

LONG = " ".join(WORDS * 9)


def ask(server, text, **extra):
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=1, extra_body=extra)


def cached(reply) -> int:
    return reply.usage.prompt_tokens_details.cached_tokens


def pins(server) -> list[dict]:
    return server.http.get("/v1/cache/pins").json()["data"]


def fill(server) -> None:
    """Push everything that can leave out of every tier."""
    for i in range(6):
        server.http.post("/v1/cache/warm", json={"prompts": [f"{i} " * 400]})


def test_warming_computes_once_and_says_how_much(server):
    prompts = [LONG, server.tokenizer(LONG[::-1])["input_ids"]]
    first = server.http.post("/v1/cache/warm", json={"prompts": prompts}).json()
    assert [one["tokens"] for one in first["prompts"]] == [
        len(server.tokenizer(t)["input_ids"]) for t in (LONG, LONG[::-1])
    ]
    assert first["computed_tokens"] == first["tokens"]
    again = server.http.post("/v1/cache/warm", json={"prompts": prompts}).json()
    assert again["computed_tokens"] < first["computed_tokens"] / 4
    body = {"messages": [{"role": "user", "content": LONG + " and more"}]}
    server.http.post("/v1/cache/warm", json=body)
    assert cached(ask(server, LONG + " and more")) > 64


def test_warming_in_events_says_how_far_it_is(model, tokenizer):
    with serving(model, tokenizer, blocks=300) as server:
        body = {"prompts": ["jumps over the dog " * 200, "the fox"], "stream": True}
        with server.http.stream("POST", "/v1/cache/warm", json=body) as reply:
            lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line[6:]) for line in lines[:-1]]
        assert events[-1]["object"] == "cache.warm" and events[-1]["tokens"] == events[-2]["tokens"]
        done = [one["tokens"] for one in events[:-1]]
        assert done == sorted(done) and done[-1] == events[0]["num_tokens"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompts": []},
        {"prompts": ["a"], "messages": [{"role": "user", "content": "x"}]},
        {"prompts": ["the " * 9000]},
    ],
)
def test_what_cannot_be_warmed_is_a_400(server, body):
    for path, more in (("warm", {}), ("pins", {"ttl_s": 5})):
        reply = server.http.post(f"/v1/cache/{path}", json=body | more)
        assert reply.status_code == 400 and len(reply.json()["error"]["message"]) > 20


def test_a_pinned_prefix_stays_when_everything_else_goes_and_leaves_when_unpinned(model, tokenizer):
    with serving(model, tokenizer, blocks=80, host=80) as server:
        reply = server.http.post("/v1/cache/pins", json={"prompts": [LONG], "ttl_s": 600})
        (pin,) = reply.json()["data"]
        tokens = len(server.tokenizer(LONG)["input_ids"])
        assert pin["tokens"] == (tokens - 1) // BLOCK * BLOCK or pin["tokens"] == tokens // BLOCK * BLOCK
        server.http.post("/v1/cache/warm", json={"prompts": [LONG[::-1]]})
        fill(server)
        kept = server.http.post("/v1/cache/warm", json={"prompts": [LONG]}).json()["prompts"][0]
        assert kept["cached_tokens"] >= pin["tokens"] - BLOCK
        lost = server.http.post("/v1/cache/warm", json={"prompts": [LONG[::-1]]}).json()["prompts"][0]
        assert lost["cached_tokens"] == 0
        assert server.http.delete(f"/v1/cache/pins/{pin['id']}").json() == {"id": pin["id"], "deleted": True}
        assert server.http.delete(f"/v1/cache/pins/{pin['id']}").status_code == 404
        fill(server)
        gone = server.http.post("/v1/cache/warm", json={"prompts": [LONG]}).json()["prompts"][0]
        assert gone["cached_tokens"] == 0


def test_pins_end_by_themselves_and_are_bounded(model, tokenizer):
    with serving(model, tokenizer, blocks=80, host=80, pinned_share=0.1) as server:
        assert server.http.post("/v1/cache/pins", json={"prompts": ["the"], "ttl_s": 60}).status_code == 400
        now_s = [1000.0]
        server.service.pins._clock = lambda: now_s[0]
        assert server.http.post("/v1/cache/pins", json={"prompts": [LONG], "ttl_s": 0.5}).status_code == 200
        assert len(pins(server)) == 1
        refused = server.http.post("/v1/cache/pins", json={"prompts": ["0 " * 300], "ttl_s": 60})
        assert refused.status_code == 429 and "delete one" in refused.json()["error"]["message"]
        now_s[0] += 0.6
        assert pins(server) == [] and server.service.pins.tokens == 0


def test_parts_marked_with_cache_control_are_kept_up_to_there(server):
    parts = [
        {"type": "text", "text": LONG, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"type": "text", "text": "what does the fox do?"},
    ]
    reply = ask(server, [{"role": "system", "content": parts}, {"role": "user", "content": "go"}])
    (pin,) = pins(server)
    prefix = len(server.tokenizer("<s><|system|>" + LONG, add_special_tokens=False)["input_ids"])
    assert prefix - BLOCK - 2 <= pin["tokens"] <= prefix < reply.usage.prompt_tokens - 8
    assert reply.usage.kvtier["pinned_tokens"] == pin["tokens"] and 3500 < pin["expires_in_s"] <= 3600
    parts[1]["text"] = "another question"
    asked_s = time.monotonic()
    again = ask(server, [{"role": "system", "content": parts}, {"role": "user", "content": "go"}])
    assert cached(again) == pin["tokens"]
    (renewed,) = pins(server)  # the same prefix: its time begins again
    assert renewed["id"] != pin["id"] and renewed["expires_in_s"] + time.monotonic() - asked_s > 3599
    server.http.delete(f"/v1/cache/pins/{renewed['id']}")


@pytest.mark.parametrize(
    ("extra", "mark", "seconds"),
    [
        ({"prompt_cache_retention": "24h"}, {}, 86400),
        ({"prompt_cache_retention": "in_memory"}, {}, None),
        ({"prompt_cache_options": {"ttl": "12h"}}, {"prompt_cache_breakpoint": {"mode": "explicit"}}, 43200),
        ({}, {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}, 1800),
        ({}, {"cache_control": {"type": "ephemeral"}}, 300),
    ],
)
def test_every_way_to_ask_for_keeping_has_its_time(server, extra, mark, seconds):
    asked_s = time.monotonic()
    ask(server, [{"role": "user", "content": [{"type": "text", "text": LONG} | mark]}], **extra)
    held = pins(server)
    took_s = time.monotonic() - asked_s
    assert len(held) == (seconds is not None)
    assert all(seconds - took_s <= one["expires_in_s"] <= seconds for one in held)
    for one in held:
        server.http.delete(f"/v1/cache/pins/{one['id']}")


def test_pins_share_blocks_and_a_longer_one_takes_a_shorter_ones_place(model, tokenizer):
    with serving(model, tokenizer) as server:

        def check(engine):
            now, pager = [0.0], engine.pager
            held = Pins(pager, 8 * BLOCK, lambda: now[0])
            seqs = []
            for ids in ([1] * 3 * BLOCK, [1] * 5 * BLOCK):
                seqs.append(pager.begin())
                pager.append(seqs[-1], ids)
                request = engine.continue_request(seqs[-1], len(ids), _warm())
                engine.run([request])
            short = held.hold(seqs[0], 3 * BLOCK, 10, "a")
            long = held.hold(seqs[1], 5 * BLOCK, 5, "a")
            assert held.tokens == 5 * BLOCK and [pin for pin, _ in held.of("a")] == [short, long]
            longer = held.hold(seqs[1], 5 * BLOCK, 20, "a")
            assert [pin for pin, _ in held.of("a")] == [longer] and held.of("b") == []
            assert held.hold(seqs[1], BLOCK - 1, 20, "a") is None
            now[0] = 21.0
            held.expire()
            assert held.tokens == 0
            for seq in seqs:
                pager.finish(seq)

        server.service.loop.call(check).result()


def _warm():
    from kvtier import SamplingParams

    return SamplingParams(max_tokens=0)


def test_stats_and_metrics_count_the_same_things(server):
    def metrics() -> dict:
        reply = server.http.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(reply.text)
        return {(s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples}

    before = metrics()
    usages = [ask(server, LONG + " for the metrics").usage for _ in range(2)]
    streamed = server.client.completions.create(
        model="tiny", prompt="the", max_tokens=4, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    usages.append(list(streamed)[-1].usage)
    after = metrics()

    def gained(*name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert (
        gained("kvtier_requests_total", "chat", "ok") == 2 and gained("kvtier_requests_total", "completions", "ok") == 1
    )
    assert gained("kvtier_time_to_first_token_seconds_count") == 3
    assert gained("kvtier_time_per_output_token_seconds_count") == 1
    assert gained("kvtier_queue_wait_seconds_count") == 3
    assert (
        gained("kvtier_hit_tokens_total", "device") > 64 and gained("kvtier_prefill_saved_seconds_total", "device") > 0
    )
    assert gained("kvtier_tokens_total", "completion") == sum(usage.completion_tokens for usage in usages)
    assert gained("kvtier_computed_tokens_total") > 6
    assert gained("kvtier_stall_seconds_total", "prefill") > 0
    stats = server.http.get("/v1/cache/stats").json()
    for tier in ("device", "host"):
        assert after["kvtier_tier_capacity_bytes", tier] == stats["tiers"][tier]["capacity_bytes"]
        assert after["kvtier_hit_tokens_total", tier] == stats["tiers"][tier]["hit_tokens"]
    assert "path" not in json.dumps(stats) and after["kvtier_ready",] == 1
    assert {"kvtier_build_info", "kvtier_queue_depth", "kvtier_queue_oldest_seconds"} <= {name[0] for name in after}
    assert not [name for name in after if "default" in name]  # no tenant in a label
