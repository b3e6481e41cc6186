"""What breaks one request, or the loop itself, takes nobody else's answer and no session's state with it."""

from __future__ import annotations

import threading

import pytest
import torch

from kvtier import SamplingParams
from kvtier.engine.sampling import Sampler
from kvtier.engine.session import Session
from kvtier.tiers.errors import ConfigError, SessionChangedError, TierFullError, UnknownSessionError

from .test_conversations import GREEDY, Served
from .test_families import stock, tiny
from .test_loop import Heard, Slow
from .test_scheduler import open_engine, prompt_of


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_whose_values_break_ends_alone(llama, monkeypatch, n):
    good, bad, prompt = Heard(), Heard(n), prompt_of(30, 1)
    wanted = stock(llama, prompt, 20)
    served, choose = Served(llama), Sampler.choose

    def broken(sampler, logits):
        logits = torch.full_like(logits, float("nan")) if sampler._params.seed == 13 else logits
        return choose(sampler, logits)

    monkeypatch.setattr(Sampler, "choose", broken)
    served.loop.submit(prompt_of(30, 2), SamplingParams(max_tokens=20, temperature=0.7, seed=13, n=n), bad)
    served.loop.submit(prompt, SamplingParams(max_tokens=20), good)
    assert good.wait().ends[0] == ("length", None) and good.tokens[0] == wanted
    assert all(reason == "error" and isinstance(error, RuntimeError) for reason, error in bad.wait().ends.values())
    served.close()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["samples", "beams"])
def test_all_outputs_of_a_request_that_never_began_are_told_so(llama, options):
    served, slow, heard = Served(llama), Slow(), Heard(3)
    served.loop.submit(prompt_of(30, 1), GREEDY, slow)
    assert slow.begun.wait(60)
    waiting = served.loop.start_request(
        lambda engine: engine.request(prompt_of(30, 2), SamplingParams(max_tokens=5, n=3, **options)), heard
    )
    served.loop.tell(lambda engine: waiting.result(0).cancel())
    slow.go.set()
    assert [heard.wait().ends[i][0] for i in range(3)] == 3 * ["cancelled"]
    slow.wait()
    served.close()


@pytest.mark.parametrize("temperature", [1e-39, 1e-6, 0])
def test_a_temperature_next_to_nothing_is_greedy(llama, temperature):
    heard, prompt = Heard(), prompt_of(30, 1)
    wanted, served = stock(llama, prompt, 5), Served(llama)
    served.loop.submit(prompt, SamplingParams(max_tokens=5, temperature=temperature), heard)
    assert heard.wait().tokens[0] == wanted
    served.close()


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0, "1"])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        SamplingParams(temperature=temperature)
    assert SamplingParams(temperature=2).temperature == 2.0


def test_a_call_that_nobody_waits_for_any_more_ends_nothing(llama):
    served, slow, ran = Served(llama), Slow(), []
    served.loop.submit(prompt_of(30, 1), GREEDY, slow)
    assert slow.begun.wait(60)
    gone = served.loop.call(lambda engine: ran.append("gone"))
    assert gone.cancel()
    kept = served.loop.call(lambda engine: ran.append("kept"))
    slow.go.set()
    kept.result(60)
    assert slow.wait().ends[0] == ("length", None) and ran == ["kept"] and served.loop.is_running
    served.close()


def test_a_turn_that_the_end_of_the_loop_cuts_off_was_never_said(llama, tmp_path, monkeypatch):
    served = Served(llama, tmp_path / "s")
    served.chats.create("a")
    served.say("a", prompt_of(30, 1))
    known, begun, heard = served.chats.info("a").tokens, threading.Event(), Heard()

    def dying(*_):
        begun.set()
        raise SystemExit("the loop ends")

    monkeypatch.setattr(served.engine, "step", dying)
    served.chats.send("a", [5, 6, 7], GREEDY, heard)
    assert heard.wait().ends[0][0] == "error" and not served.loop.is_running
    assert served.chats.park("a").tokens == known
    served.close(park=False)


def test_beams_are_refused_where_there_are_none_and_need_no_logprobs(llama):
    served, heard = Served(llama), Heard()
    served.chats.create("a")
    with pytest.raises(ConfigError, match="num_beams"):
        served.chats.send("a", [1, 2, 3], SamplingParams(max_tokens=3, num_beams=2), heard)
    served.loop.submit(prompt_of(30, 1), SamplingParams(max_tokens=3, num_beams=2, logprobs=2), heard)
    assert heard.wait().ends[0] == ("length", None) and len(heard.tokens[0]) == 3
    served.close()


def test_an_import_or_fork_that_the_disk_refuses_leaves_nothing(llama, tmp_path, monkeypatch):
    served = Served(llama, tmp_path / "s")
    chats = served.chats
    chats.create("a")
    served.say("a", prompt_of(30, 1))
    chats.export_session("a", tmp_path / "a.kvt")

    def refuse(session):
        raise TierFullError("no room", retry_after_s=0.1)

    with monkeypatch.context() as full:
        full.setattr(Session, "checkpoint", refuse)
        for call in (lambda: chats.import_session("b", tmp_path / "a.kvt"), lambda: chats.fork("a", 2)):
            with pytest.raises(TierFullError):
                call()
    assert [one.id for one in chats.list_sessions()] == ["a"] and len(served.engine.pager._core.sequences) == 1
    with pytest.raises(UnknownSessionError):
        chats.info("b")
    assert chats.import_session("b", tmp_path / "a.kvt").tokens == 35
    assert chats.fork("a", 1)[0].id == "a/1"
    served.close()


def test_a_session_that_another_process_went_on_with_is_taken_up_as_it_is_stored(llama, tmp_path, monkeypatch):
    served, heard = Served(llama, tmp_path / "s"), Heard()
    served.chats.create("a")
    served.say("a", prompt_of(30, 1))

    def changed(session):
        raise SessionChangedError("session 'a' was changed by another process since")

    with monkeypatch.context() as stale:
        stale.setattr(Session, "checkpoint", changed)
        served.chats.send("a", [5, 6], GREEDY, heard)
        assert isinstance(heard.wait().ends[0][1], SessionChangedError)
        served.chats.park_all()  # and what we had of it is not stored over it
    assert served.chats.info("a").tokens == 35
    assert len(served.say("a", [7])) == 5 and served.chats.info("a").tokens == 41
    served.close()


class Breaks(Heard):
    """Raises at the first token of one output."""

    def __init__(self, n: int, at: int) -> None:
        super().__init__(n)
        self.at = at

    def on_token(self, index, token, logprob) -> bool:
        if index == self.at:
            raise ValueError("the listener breaks")
        return super().on_token(index, token, logprob)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["samples", "beams"])
def test_a_listener_that_breaks_ends_its_own_request(llama, options, at):
    served, heard, after = Served(llama), Breaks(3, at), Heard()
    served.loop.submit(prompt_of(30, 1), SamplingParams(max_tokens=5, n=3, **options), heard)
    ends = heard.wait().ends
    assert ends[at][0] == "error" and isinstance(ends[at][1], ValueError)
    served.loop.submit(prompt_of(30, 2), GREEDY, after)
    assert after.wait().ends[0] == ("length", None)
    served.close()


def test_a_priority_below_others_is_a_step_of_its_own(llama):
    engine = open_engine(llama)
    scheduler, now_s = engine.scheduler, [0.0]
    scheduler.clock = lambda: now_s[0]
    low, high = (engine.request(prompt_of(30, 1), GREEDY, priority=one) for one in (-1, 0))
    scheduler.add(low)
    now_s[0] = 1.0
    scheduler.add(high)
    assert scheduler._queue() == [high, low] and scheduler._level(low) == -1
    now_s[0] = 10.5
    assert scheduler._level(low) == 0 == scheduler._level(high) and scheduler._queue() == [low, high]
    for one in (low, high):
        one.end("cancelled")
    engine.settle_ended()
    engine.close()
