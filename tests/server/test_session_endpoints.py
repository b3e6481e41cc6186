"""Sessions over HTTP: turns that go on where the last one ended, and verbs, each with its refusals."""

from __future__ import annotations

import json
import threading
import time

import pytest

from kvtier.engine.session import Session
from kvtier.engine.template import render_turn
from kvtier.tiers.errors import TierFullError

from .running import WORDS, serving, stock


@pytest.fixture(scope="module")
def stored(model, tokenizer, tmp_path_factory):
    with serving(model, tokenizer, nvme_path=tmp_path_factory.mktemp("store") / "store") as server:
        yield server


def turn(server, session_id: str, text: str, **options):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0} | options
    return server.http.post(f"/v1/sessions/{session_id}/messages", json=body)


def say(server, session_id: str, text: str, **options) -> dict:
    reply = turn(server, session_id, text, **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


def state(server, session_id: str) -> dict:
    return server.http.get(f"/v1/sessions/{session_id}").json()


def test_a_conversation_goes_on_through_park_and_resume_as_the_model_alone_would(stored):
    assert stored.http.post("/v1/sessions", json={"id": "long"}).json()["state"] == "active"
    ids: list[int] = []
    for i, text in enumerate([" ".join(WORDS * 4), "and then?", "the end"]):
        ids += render_turn(stored.tokenizer, text, ids)
        out = stock(stored.model, ids, 8)
        reply = say(stored, "long", text)
        answer = reply["choices"][0]["message"]["content"]
        assert answer.rstrip("\ufffd") == stored.tokenizer.decode(out, skip_special_tokens=True).rstrip("\ufffd")
        assert reply["usage"]["prompt_tokens"] == len(ids)
        if i:
            details = reply["usage"]["prompt_tokens_details"]
            assert (
                details["cached_tokens"] >= reply["usage"]["prompt_tokens"] - 24 and details["recomputed_tokens"] == 0
            )
        ids += out
        parked = stored.http.post("/v1/sessions/long/park").json()
        assert parked["state"] == "parked" and parked["is_durable"] and parked["tokens"] == len(ids)
    assert stored.http.post("/v1/sessions/long/resume").json()["state"] == "active"
    assert stored.http.delete("/v1/sessions/long").json() == {"id": "long", "deleted": True}
    assert stored.http.get("/v1/sessions/long").status_code == 404


def test_forks_go_their_own_ways_and_rollback_forgets(stored):
    stored.http.post("/v1/sessions", json={"id": "tree"})
    say(stored, "tree", "pack my box")
    before = state(stored, "tree")["tokens"]
    forks = stored.http.post("/v1/sessions/tree/fork", json={"n": 2}).json()["data"]
    assert [one["id"] for one in forks] == ["tree~1", "tree~2"] and {one["tokens"] for one in forks} == {before}
    one, other = say(stored, "tree~1", "jumps 5"), say(stored, "tree~2", "what is 42?")
    assert one["usage"]["prompt_tokens_details"]["cached_tokens"] >= before - 1
    assert one["choices"] != other["choices"] and state(stored, "tree")["tokens"] == before
    back = stored.http.post("/v1/sessions/tree~1/rollback", json={"num_tokens": before}).json()
    assert back["tokens"] == before
    assert say(stored, "tree~1", "what is 42?")["choices"] == other["choices"]
    assert stored.http.post("/v1/sessions/tree~1/rollback", json={"num_tokens": 10**6}).status_code == 400
    listed = {one["id"] for one in stored.http.get("/v1/sessions").json()["data"]}
    assert {"tree", "tree~1", "tree~2"} <= listed
    for name in ("tree", "tree~1", "tree~2"):
        assert stored.http.delete(f"/v1/sessions/{name}").status_code == 200


def test_turns_stream_stop_and_report_like_chat(stored):
    stored.http.post("/v1/sessions", json={"id": "s"})
    whole = say(stored, "s", "the dog", max_tokens=20)["choices"][0]["message"]["content"]
    stored.http.post("/v1/sessions/s/rollback", json={"num_tokens": 0})
    stop = whole[6:9]
    body = {"messages": [{"role": "user", "content": "the dog"}], "max_tokens": 20, "temperature": 0, "stop": stop}
    with stored.http.stream("POST", "/v1/sessions/s/messages", json=body | {"stream": True}) as reply:
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole[: whole.index(stop)] and lines[-1] == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["completion_tokens"] <= 20
    stored.http.delete("/v1/sessions/s")


def test_a_busy_session_is_a_409_and_a_turn_whose_client_hung_up_never_was(stored):
    stored.http.post("/v1/sessions", json={"id": "busy"})
    say(stored, "busy", "the fox")
    before = state(stored, "busy")["tokens"]
    body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 3000, "temperature": 0, "stream": True}
    with stored.http.stream("POST", "/v1/sessions/busy/messages", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert state(stored, "busy")["state"] == "busy"
        for verb in ("park", "fork", "messages", "rollback"):
            refused = stored.http.post(f"/v1/sessions/busy/{verb}", json=body | {"n": 1, "num_tokens": 0})
            assert refused.status_code == 409, (verb, refused.text)
            assert "at work" in refused.json()["error"]["message"]
        assert stored.http.delete("/v1/sessions/busy").status_code == 409
    deadline_s = time.monotonic() + 60
    while state(stored, "busy")["state"] == "busy" and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert state(stored, "busy")["tokens"] == before
    assert stored.http.delete("/v1/sessions/busy").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("", {"id": "a b"}, 400, "A-Za-z0-9"),
        ("", {"id": "x~1"}, 400, "A-Za-z0-9"),
        ("", {"id": "x" * 65}, 400, "{1,64}"),
        ("", {"id": 5}, 400, "string"),
        ("/nobody/park", {}, 404, "GET /v1/sessions"),
        ("/nobody/messages", {"messages": [{"role": "user", "content": "x"}]}, 404, "unknown"),
        ("/we%20ird/park", {}, 404, "no id of a session"),
        ("/known/fork", {"n": 0}, 400, "greater than or equal to 1"),
        ("/known/rollback", {}, 400, "num_tokens"),
        ("/known/messages", {"messages": []}, 400, "at least 1"),
        ("/known/messages", {"messages": [{"role": "user", "content": "x"}], "n": 2}, 400, "fork"),
        ("/known/messages", {"messages": [{"role": "user", "content": "the " * 9000}]}, 400, "context of"),
        ("/known/messages", {"messages": [{"role": "user", "content": "x"}], "cache_salt": "s"}, 400, "cache_salt"),
    ],
)
def test_what_a_session_cannot_do_is_a_4xx(stored, path, body, status, says):
    stored.http.post("/v1/sessions", json={"id": "known"})
    assert stored.http.post("/v1/sessions", json={"id": "known"}).status_code in (400, 409)
    reply = stored.http.post(f"/v1/sessions{path}", json=body)
    assert reply.status_code == status and says in reply.json()["error"]["message"], reply.text
    assert stored.http.delete("/v1/sessions/known").status_code == 200


def test_a_turn_that_no_disk_took_says_so(stored, monkeypatch):
    def refuse(session) -> None:
        raise TierFullError("no space left")

    def told(reply: dict) -> tuple[bool, bool]:
        return reply["usage"]["kvtier"]["is_durable"], state(stored, "unsafe")["is_durable"]

    stored.http.post("/v1/sessions", json={"id": "unsafe"})
    assert told(say(stored, "unsafe", "the fox")) == (True, True)
    with monkeypatch.context() as full:
        full.setattr(Session, "checkpoint", refuse)
        assert told(say(stored, "unsafe", "and then?")) == (False, False)
        body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 2, "stream": True}
        with stored.http.stream("POST", "/v1/sessions/unsafe/messages", json=body) as reply:
            lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
        assert told(json.loads(lines[-2])) == (False, False)
    assert told(say(stored, "unsafe", "the end")) == (True, True)
    chat = stored.http.post("/v1/chat/completions", json=body | {"stream": False}).json()
    assert "is_durable" not in chat["usage"]["kvtier"]
    stored.http.delete("/v1/sessions/unsafe")


def test_a_turn_that_is_refused_was_never_said(stored):
    stored.http.post("/v1/sessions", json={"id": "refused"})
    say(stored, "refused", "the fox")
    before = state(stored, "refused")["tokens"]
    reply = turn(stored, "refused", "and then?", attention="select:8")
    assert reply.status_code == 400 and "selection_bytes" in reply.text
    assert state(stored, "refused")["tokens"] == before
    stored.http.delete("/v1/sessions/refused")


def test_idle_sessions_are_parked_and_many_talk_at_once(model, tokenizer, tmp_path):
    with serving(model, tokenizer, nvme_path=tmp_path / "store", blocks=24, idle_s=0.4) as server:
        names = [f"many-{i}" for i in range(8)]
        failed = []

        def talk(name: str) -> None:
            try:
                server.http.post("/v1/sessions", json={"id": name})
                said = [
                    say(server, name, f"{word} {name}", temperature=0)["usage"]["prompt_tokens"] for word in WORDS[:3]
                ]
                assert said == sorted(said)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=talk, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert server.http.get("/v1/sessions").status_code == 200  # also while they are parked and resumed
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert not failed
        deadline_s = time.monotonic() + 60
        while {state(server, name)["state"] for name in names} != {"parked"} and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert {state(server, name)["state"] for name in names} == {"parked"}


def released_blocks(server) -> int:
    def look(engine) -> int:
        return int(engine.pager._core.groups[0].directory.is_released.sum())

    return server.service.loop.call(look).result()


def test_who_says_that_a_session_is_over_lets_its_blocks_leave_first(stored):
    before = released_blocks(stored)
    stored.http.post("/v1/sessions", json={"id": "over"})
    say(stored, "over", " ".join(["unlike", "any", "other"] * 12))
    assert released_blocks(stored) == before
    stored.http.post("/v1/sessions/over/park")
    stored.http.delete("/v1/sessions/over")
    after = released_blocks(stored)
    assert after > before
    text = " ".join(["nor", "like", "this", "one"] * 12)
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    assert stored.http.post("/v1/chat/completions", json=body).status_code == 200
    assert released_blocks(stored) == after
    body["messages"][0]["content"] = text.upper()
    assert stored.http.post("/v1/chat/completions", json=body | {"end_of_session": True}).status_code == 200
    assert released_blocks(stored) > after


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        (
            {"messages": [{"role": "user", "content": "x", "cache_control": {"type": "ephemeral"}}]},
            "messages.0.cache_control",
        ),
        *(
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]},
                f"messages.0.content.1.{name}",
            )
            for name, mark in [("cache_control", {"ttl": "1h"}), ("prompt_cache_breakpoint", {"mode": "explicit"})]
            for part in [{"type": "text", "text": "y", name: mark}]
        ),
    ],
)
def test_what_keeps_a_prompt_is_refused_by_name_in_a_turn(stored, change, param):
    stored.http.post("/v1/sessions", json={"id": "kept"})
    refused = turn(stored, "kept", "hello", **change)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == param and param in error["message"], error
    assert "/v1/cache/pins" in error["message"] and state(stored, "kept")["tokens"] == 0
    say(stored, "kept", "hello", prompt_cache_retention="in_memory")  # that is what happens anyway
    stored.http.delete("/v1/sessions/kept")


def test_a_turn_does_not_end_its_session(stored):
    stored.http.post("/v1/sessions", json={"id": "goes-on"})
    refused = turn(stored, "goes-on", "hello", end_of_session=True)
    assert refused.status_code == 400 and "DELETE" in refused.text and "end_of_session" in refused.text
    stored.http.delete("/v1/sessions/goes-on")
