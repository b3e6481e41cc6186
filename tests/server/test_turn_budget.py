"""How long a turn's answer may be where the tiers, or the settings, bound the context."""

from __future__ import annotations

import pytest

from .running import serving

CONTEXT = 100


@pytest.fixture(scope="module", params=["tiers", "settings"])
def small(request, model, tokenizer):
    """Without a store. What bounds the context: a device tier of a few blocks, or max_context."""
    bounds = dict(blocks=12, host=0) if request.param == "tiers" else dict(max_context=CONTEXT)
    with serving(model, tokenizer, **bounds) as server:
        yield server


def turn(server, session_id: str, text: str, **options):
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0} | options
    return server.http.post(f"/v1/sessions/{session_id}/messages", json=body)


def begin(server, session_id: str) -> int:
    """A session whose first turn a stop text ended, so that the next one has the end token to append. Tokens known."""
    server.http.post("/v1/sessions", json={"id": session_id})
    whole = turn(server, session_id, "the dog", max_tokens=20).json()["choices"][0]["message"]["content"]
    server.http.post(f"/v1/sessions/{session_id}/rollback", json={"num_tokens": 0})
    reply = turn(server, session_id, "the dog", stop=whole[6:9])
    assert reply.status_code == 200 and reply.json()["choices"][0]["finish_reason"] == "stop", reply.text
    return server.http.get(f"/v1/sessions/{session_id}").json()["tokens"]


def test_two_turns_without_a_limit_use_what_the_context_leaves(small):
    begin(small, "open")
    reply = turn(small, "open", "and the fox?")
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    assert reply.json()["usage"]["total_tokens"] == small.service.max_context
    full = turn(small, "open", "more")
    assert full.status_code == 400 and full.json()["error"]["code"] == "context_length_exceeded"
    assert small.http.delete("/v1/sessions/open").status_code == 200


def test_a_limit_that_does_not_fit_is_refused_to_the_token(small):
    known = begin(small, "given")
    new = len(small.encode_chat("and the fox?")) + 1  # the end of the answer before, and a line instead of the bos
    left = small.service.max_context - known - new
    for limit in ({"max_tokens": left + 1}, {"max_completion_tokens": left + 1}):
        refused = turn(small, "given", "and the fox?", **limit)
        assert refused.status_code == 400 and "context" in refused.json()["error"]["message"], refused.text
        assert small.http.get("/v1/sessions/given").json()["tokens"] == known
    reply = turn(small, "given", "and the fox?", max_tokens=left)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == left, reply.text
    assert small.http.delete("/v1/sessions/given").status_code == 200


def test_a_message_that_leaves_no_token_for_an_answer_is_refused(small):
    known = begin(small, "over")
    left = small.service.max_context - known
    text = "?"
    while len(small.encode_chat(text)) < left - 1:
        text += " ?"
    refused = turn(small, "over", text)  # alone it would leave one token; with the end token before it leaves none
    assert refused.status_code == 400 and "context" in refused.json()["error"]["message"], refused.text
    assert small.http.get("/v1/sessions/over").json()["tokens"] == known
    assert small.http.delete("/v1/sessions/over").status_code == 200
