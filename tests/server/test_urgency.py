"""Who gives way to whom, and how long a request may take, as the client says."""

from __future__ import annotations

import pytest

from .running import serving
from .test_refusals import error_of

TEXT = {"model": "tiny", "prompt": "the quick", "max_tokens": 2, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 2, "temperature": 0}


@pytest.fixture
def scheduled(monkeypatch):
    """Priority, and seconds until the deadline, of every request that is scheduled."""
    found: list[tuple[int, float | None]] = []

    def watch(server) -> list[tuple[int, float | None]]:
        scheduler = server.service.engine.scheduler
        add = scheduler.add

        def noted(request, *options, **more):
            now_s = scheduler.clock()
            found.append((request.priority, None if request.deadline_s is None else request.deadline_s - now_s))
            return add(request, *options, **more)

        monkeypatch.setattr(scheduler, "add", noted)
        return found

    return watch


def test_a_request_says_how_urgent_it_is_and_how_long_it_may_take(model, tokenizer, scheduled):
    with serving(model, tokenizer, request_timeout_s=600.0) as server:
        found = scheduled(server)
        server.http.post("/v1/sessions", json={"id": "a"}).raise_for_status()
        for path, body in (("completions", TEXT), ("chat/completions", CHAT), ("sessions/a/messages", CHAT)):
            for asked in ({}, {"priority": 5, "timeout_s": 60}, {"priority": 0, "timeout_s": 6000.0}):
                server.http.post(f"/v1/{path}", json=body | asked).raise_for_status()
        assert [priority for priority, _ in found] == 3 * [0, -5, 0]
        assert [round(left_s, -1) for _, left_s in found] == 3 * [600, 60, 600]  # never more than the server's


def test_all_outputs_of_a_request_give_way(model, tokenizer, scheduled):
    with serving(model, tokenizer) as server:
        found = scheduled(server)
        server.http.post("/v1/completions", json=TEXT | {"n": 3, "priority": 7}).raise_for_status()
        assert {priority for priority, _ in found} == {-7} and {left_s for _, left_s in found} == {None}


def test_a_request_past_the_time_it_asked_for_is_told_so(model, tokenizer):
    with serving(model, tokenizer) as server:
        scheduler = server.service.engine.scheduler
        plain = scheduler.clock
        scheduler.clock = lambda: 1e3 if any(r.output.token_ids for r in scheduler.active) else 0.0
        reply = server.http.post("/v1/completions", json=TEXT | {"max_tokens": 3500, "timeout_s": 60})
        scheduler.clock = plain
        assert reply.status_code == 400 and error_of(reply)["code"] == "deadline"


@pytest.mark.parametrize("asked", [{"priority": -1}, {"priority": 1.5}, {"timeout_s": 0}, {"timeout_s": 1e9}])
def test_nobody_goes_before_others_or_waits_for_ever(server, asked):
    reply = server.http.post("/v1/completions", json=TEXT | asked)
    assert reply.status_code == 400 and error_of(reply)["param"] == next(iter(asked))
