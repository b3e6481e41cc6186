"""At the limits of /v1/cache: pins that are refused, and warming that the engine refuses halfway."""

from __future__ import annotations

import json

import pytest

from kvtier import SamplingParams
from kvtier.engine.server import pins as pins_module
from kvtier.engine.server.pins import Pins
from kvtier.tiers.errors import QueueFullError, TierUnavailableError

from .running import BLOCK


def on_engine(server, check) -> None:
    """Run check(engine, [a sequence of 5 computed blocks, of 3 of another prompt]) between two steps."""

    def run(engine):
        pager, seqs = engine.pager, []
        try:
            for token, blocks in ((1, 5), (2, 3)):
                seqs.append(pager.begin())
                pager.append(seqs[-1], [token] * blocks * BLOCK)
                request = engine.continue_request(seqs[-1], blocks * BLOCK, SamplingParams(max_tokens=0))
                engine.run([request])
            check(engine, *seqs)
        finally:
            for seq in seqs:
                pager.finish(seq)

    server.service.loop.call(run).result()


def test_a_refused_longer_pin_leaves_the_shorter_one(server):
    def check(engine, seq, other):
        held = Pins(engine.pager, 4 * BLOCK, lambda: 0.0)
        first = held.hold(seq, 3 * BLOCK, 10, "a")
        for refused, blocks in ((seq, 5), (other, 2)):
            with pytest.raises(QueueFullError, match="pins hold 3 of at most 4 blocks"):
                held.hold(refused, blocks * BLOCK, 20, "a")
            assert held.of("a") == [(first, 10.0)] and held.tokens == 3 * BLOCK
            assert first.seq in engine.pager._core.sequences
        longer = held.hold(seq, 4 * BLOCK, 20, "a")  # it fits: what the first holds counts once
        assert held.of("a") == [(longer, 20.0)] and held.tokens == 4 * BLOCK
        assert first.seq not in engine.pager._core.sequences
        held.close()
        assert held.tokens == 0 and sorted(engine.pager._core.sequences) == sorted([seq, other])

    on_engine(server, check)


def test_as_many_pins_as_may_be_are_renewed_and_no_more(server, monkeypatch):
    def check(engine, seq, other):
        monkeypatch.setattr(pins_module, "MAX_PINS", 1)
        held = Pins(engine.pager, 64 * BLOCK, lambda: 0.0)
        held.hold(seq, 3 * BLOCK, 10, "a")
        renewed = held.hold(seq, 3 * BLOCK, 20, "a")
        for refused, owner in ((other, "a"), (seq, "b")):
            with pytest.raises(QueueFullError, match="1 of at most 1 pins"):
                held.hold(refused, 3 * BLOCK, 30, owner)
        assert held.of("a") == [(renewed, 20.0)] and held.of("b") == []
        held.close()

    on_engine(server, check)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (None, "rate_limit_error", "queue_full"),  # as the engine loop refuses
        (TierUnavailableError("the engine has ended; start the server again"), "server_error", "tier_unavailable"),
        (RuntimeError("not for clients"), "server_error", "internal"),
    ],
)
def test_warming_that_is_refused_halfway_says_so_in_its_last_event(server, monkeypatch, error, kind, code):
    generate, num_calls = server.service.generate, 0

    async def refused_at_the_second(*args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            if error is not None:
                raise error
            monkeypatch.setattr(server.service.loop, "_max_waiting", 0)
        return await generate(*args, **kwargs)

    monkeypatch.setattr(server.service, "generate", refused_at_the_second)
    body = {"prompts": ["the quick fox", "jumps", "over the dog"], "stream": True}
    with server.http.stream("POST", "/v1/cache/warm", json=body) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
    assert reply.status_code == 200 and lines[-1] == "data: [DONE]" and num_calls == 2
    *progress, last = (json.loads(line[6:]) for line in lines[:-1])
    assert progress[-1]["prompts"] == 1 and {one["object"] for one in progress} == {"cache.warm.progress"}
    assert (last["error"]["type"], last["error"]["code"]) == (kind, code)
    assert "not for clients" not in last["error"]["message"]
    monkeypatch.undo()
    assert server.http.post("/v1/cache/warm", json={"prompts": ["over"]}).status_code == 200
