"""Whatever a client does wrong is a 4xx in OpenAI's body, with a message that says what to do."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import pytest

from kvtier.engine.server import gate
from kvtier.engine.server.settings import ServerSettings, check_exposure, load_api_keys
from kvtier.tiers.errors import Busy, ConfigError

from .running import WAIT_S, serving

CHAT = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 2}
TEXT = {"prompt": "the fox", "max_tokens": 2}


def error_of(reply) -> dict:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) > 15
    return error


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0", "text"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages.0.tool_calls", "text only"),
        ({"tools": [{"type": "function"}]}, "tools", "leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format", "leave it out"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "1 to 256"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 30}, "top_logprobs", "20"),
        ({"max_tokens": 100_000}, "messages", "shorten the prompt"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "greater than or equal to 0"),
        ({"prompt_cache_retention": "1y"}, "prompt_cache_retention", "'24h'"),
        ({"cache_salt": ""}, "cache_salt", "at least 1"),
    ],
)
def test_a_chat_that_cannot_be_is_a_400_that_names_the_field(server, change, param, says):
    reply = server.http.post("/v1/chat/completions", json=CHAT | change)
    error = error_of(reply)
    assert reply.status_code == 400 and error["param"].startswith(param) and says in error["message"], error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": ""}, "at least one token"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": [[]]}, "at least one token"),
        ({"prompt": [99_999]}, "ids 0 to"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["the"] * 65}, "at most 64"),
        ({"prompt": "the", "best_of": 3}, "best_of is not supported"),
        ({"prompt": "the", "echo": True}, "echo is not supported"),
        ({"prompt": "the fox " * 3000}, "shorten the prompt"),
    ],
)
def test_a_completion_that_cannot_be_is_a_400(server, change, says):
    reply = server.http.post("/v1/completions", json=TEXT | change)
    assert reply.status_code == 400 and says in error_of(reply)["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"messages": ' + b"[" * 5000, b"1" * 5000])
def test_a_body_that_is_no_json_object_is_a_400(server, body):
    reply = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and error_of(reply)
    assert server.http.post("/v1/chat/completions", content=b'{"messages": []}').status_code == 400


def test_the_client_raises_its_own_errors(server):
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        server.client.chat.completions.create(model="gpt-9", messages=CHAT["messages"])
    with pytest.raises(openai.BadRequestError, match="context of"):
        server.client.completions.create(model="tiny", prompt="the " * 9000)
    with pytest.raises(openai.NotFoundError, match="there is no POST /v1/embeddings"):
        server.client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.NotFoundError, match="not served"):
        server.client.models.retrieve("other")
    reply = server.http.get("/v1/chat/completions")
    assert server.http.options("/v1/cache/pins").headers["allow"] == "GET, POST"
    assert reply.status_code == 405 and "does not take GET" in error_of(reply)["message"]


def test_a_body_that_is_too_large_is_a_413_however_it_is_sent(model, tokenizer, monkeypatch):
    monkeypatch.setattr(gate, "_LINGER_S", WAIT_S)  # however long it takes to send: who has not read it all, resets
    with serving(model, tokenizer, max_request_bytes=1000) as server:
        large = json.dumps(TEXT | {"prompt": "x" * (4 << 20)}).encode()
        reply = server.http.post("/v1/completions", content=large, headers={"content-type": "application/json"})
        assert reply.status_code == 413 and "--max-request-bytes" in error_of(reply)["message"]
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=WAIT_S)
        pieces = (large[i : i + 65536] for i in range(0, len(large), 65536))
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert server.http.post("/v1/completions", json=TEXT).status_code == 200


def test_more_requests_than_allowed_are_429_and_may_come_again(model, tokenizer, monkeypatch):
    with serving(model, tokenizer, max_concurrency=2) as server:
        body, is_refused = TEXT | {"max_tokens": 20, "temperature": 0}, threading.Event()
        runner = server.service.engine._runner
        plain = runner.forward

        def ask(_: int):
            reply = server.http.post("/v1/completions", json=body)
            if reply.status_code == 429:
                is_refused.set()
            return reply

        def forward(*batch):  # nobody is done before somebody was refused
            assert is_refused.wait(WAIT_S)
            return plain(*batch)

        monkeypatch.setattr(runner, "forward", forward)
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(ask, range(8)))
        codes = sorted(reply.status_code for reply in replies)
        assert codes[:2] == [200, 200] and codes[-1] == 429
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert refused.headers["retry-after"] == "1" and error_of(refused)["type"] == "rate_limit_error"
        patient = server.client.with_options(max_retries=5)
        assert patient.completions.create(model="tiny", prompt="the", max_tokens=1).usage.completion_tokens == 1


def test_a_request_past_its_time_is_told_so(model, tokenizer):
    with serving(model, tokenizer, request_timeout_s=60.0) as server:
        scheduler = server.service.engine.scheduler
        plain = scheduler.clock
        scheduler.clock = lambda: 1e3 if any(r.output.token_ids for r in scheduler.active) else 0.0
        reply = server.http.post("/v1/completions", json=TEXT | {"max_tokens": 3500, "temperature": 0})
        assert reply.status_code == 400 and "fewer tokens" in error_of(reply)["message"]
        assert error_of(reply)["code"] == "deadline"
        late = itertools.count(0.0, 1e3)
        scheduler.clock = lambda: next(late)
        reply = server.http.post("/v1/completions", json=TEXT)  # its time is over before it is let in
        assert reply.status_code == 503 and "try again" in error_of(reply)["message"]
        assert error_of(reply)["code"] == "deadline" and reply.headers["retry-after"] == "1"
        scheduler.clock = plain


def test_a_tier_that_is_too_slow_is_a_503_and_no_conflict(model, tokenizer, monkeypatch):
    def slow(*_, **__):
        raise Busy("lease: still waiting for 3 blocks", retry_after_s=0.1)

    with serving(model, tokenizer) as server:
        with monkeypatch.context() as patched:
            patched.setattr(server.service.engine.pager, "lease", slow)
            for path, body in (("completions", TEXT), ("chat/completions", CHAT)):
                reply = server.http.post(f"/v1/{path}", json=body)
                assert reply.status_code == 503 and "waiting for 3 blocks; try again" in error_of(reply)["message"]
                assert reply.headers["retry-after"] == "1"
        assert server.http.post("/v1/completions", json=TEXT).status_code == 200


def test_a_step_that_fails_is_a_500_for_its_request_and_the_server_goes_on(model, tokenizer, monkeypatch, caplog):
    with serving(model, tokenizer) as server:
        runner = server.service.engine._runner
        plain = runner.forward

        def broken(*_):
            raise RuntimeError("secret of the model")

        monkeypatch.setattr(runner, "forward", broken)
        reply = server.http.post("/v1/completions", json=TEXT)
        assert reply.status_code == 500 and "secret" not in reply.text
        with server.http.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("data")]
        assert json.loads(lines[0][6:])["error"]["code"] == "internal" and lines[-1] == "data: [DONE]"
        monkeypatch.setattr(runner, "forward", plain)
        assert server.http.post("/v1/completions", json=TEXT).status_code == 200


def test_when_the_engine_has_ended_the_server_lives_and_is_not_ready(model, tokenizer):
    with serving(model, tokenizer, is_expected_to_fail=True) as server:

        def end(engine):
            raise SystemExit("the engine's thread dies")

        server.service.loop.tell(end)
        while server.service.loop.failure is None:
            pass
        assert server.http.get("/health").status_code == 200 == server.http.get("/metrics").status_code
        for reply in (server.http.get("/ready"), server.http.post("/v1/chat/completions", json=CHAT)):
            assert reply.status_code == 503 and "start" in error_of(reply)["message"]
            assert int(reply.headers["retry-after"]) > 0


def test_sessions_are_bounded(model, tokenizer):
    with serving(model, tokenizer, max_sessions=2) as server:
        codes = [server.http.post("/v1/sessions", json={}).status_code for _ in range(3)]
        assert codes == [200, 200, 429]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_nobody_serves_others_without_keys(host):
    with pytest.raises(ConfigError, match="--api-keys FILE"):
        check_exposure(host, ServerSettings("m"))
    check_exposure(host, ServerSettings("m", api_keys={"k" * 16: "a"}))
    for loopback in ("127.0.0.1", "::1", "localhost"):
        check_exposure(loopback, ServerSettings("m"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read"),
        ("", "holds no key"),
        ("a = ", "not valid TOML"),
        ('"short" = "a"', "at least 16"),
        ('"a key with spaces in it" = "a"', "no space"),
        ('"0123456789abcdef" = "a b"', "namespace='a b'"),
        ('"0123456789abcdef" = "a--b"', "'--'"),
        ('["0123456789abcdef"]\nx = 1', "without tables"),
        ('"0123456789abcdef" = "' + "n" * 60 + '"', "46 characters"),
    ],
)
def test_a_file_of_keys_that_cannot_be_is_refused_without_showing_a_key(tmp_path, text, says):
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says) as raised:
        load_api_keys(str(path))
    assert "0123456789abcdef" not in str(raised.value)
