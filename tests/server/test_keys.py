"""API keys are namespaces: nobody hits, sees, takes or ends what is another's; a salt divides one further."""

from __future__ import annotations

import openai
import pytest

from kvtier.pager.keys import owner_tag

from .running import WORDS, serving

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789ab"
LONG = " ".join(WORDS * 9)


@pytest.fixture(scope="module")
def keyed(model, tokenizer):
    with serving(model, tokenizer, api_keys={ALICE: "alice", BOB: "bob"}) as server:
        yield server


def cached(client, text: str, **extra) -> int:
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], max_tokens=1, extra_body=extra
    )
    return reply.usage.prompt_tokens_details.cached_tokens


def test_a_hit_in_one_namespace_is_none_in_another(keyed):
    (alice, _), (bob, _) = keyed.with_key(ALICE), keyed.with_key(BOB)
    assert cached(alice, LONG) == 0 and cached(alice, LONG) > 0
    assert cached(bob, LONG) == 0 and cached(bob, LONG) > 0


def test_a_salt_divides_a_namespace(keyed):
    alice, _ = keyed.with_key(ALICE)
    text = LONG[::-1]
    assert cached(alice, text) == 0 and cached(alice, text, cache_salt="s") == 0
    assert cached(alice, text, cache_salt="s") > 0 and cached(alice, text, cache_salt="t") == 0
    owners = {int(o) for g in keyed.service.engine.pager._core.groups for o in g.directory.owner[g.directory.live()]}
    assert owners <= {owner_tag("alice"), owner_tag("bob")}  # quotas see whose it is, whatever the salt


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong-key-0123456789", f"Basic {ALICE}", ALICE, "Bearer", f"Bearer {ALICE}x"]
)
def test_without_a_right_key_there_is_nothing_but_probes(keyed, header):
    headers = {} if header is None else {"Authorization": header}
    for path in ("/v1/models", "/v1/sessions", "/v1/cache/stats", "/metrics", "/openapi.json", "/nothing"):
        reply = keyed.http.get(path, headers=headers)
        assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer KEY" in reply.json()["error"]["message"]
    assert keyed.http.get("/health").status_code == keyed.http.get("/ready").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        keyed.client.models.list()


def test_sessions_and_pins_belong_to_their_namespace(keyed):
    (_, alice), (_, bob) = keyed.with_key(ALICE), keyed.with_key(BOB)
    assert alice.post("/v1/sessions", json={"id": "same"}).status_code == 200
    assert bob.get("/v1/sessions/same").status_code == 404
    assert bob.post("/v1/sessions", json={"id": "same"}).status_code == 200  # not even the name is taken
    turn = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 2}
    assert alice.post("/v1/sessions/same/messages", json=turn).status_code == 200
    assert bob.get("/v1/sessions/same").json()["tokens"] == 0
    for verb in ("park", "resume", "fork", "rollback", "messages"):
        body = {"n": 1, "num_tokens": 0} | turn
        assert bob.post(f"/v1/sessions/alice:same/{verb}", json=body).status_code == 404
    pin = alice.post("/v1/cache/pins", json={"prompts": [LONG], "ttl_s": 60}).json()["data"][0]
    assert bob.get("/v1/cache/pins").json()["data"] == []
    assert bob.delete(f"/v1/cache/pins/{pin['id']}").status_code == 404
    assert bob.get("/v1/cache/stats").json()["pins"] == 0 and alice.get("/v1/cache/stats").json()["pins"] == 1
    assert alice.delete(f"/v1/cache/pins/{pin['id']}").status_code == 200
    for client in (alice, bob):
        assert [one["id"] for one in client.get("/v1/sessions").json()["data"]] == ["same"]
        assert client.delete("/v1/sessions/same").status_code == 200
