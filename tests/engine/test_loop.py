"""Many threads on one engine: everybody gets what is theirs, nobody waits for somebody else's failure."""

from __future__ import annotations

import threading
import time

import pytest

from kvtier import SamplingParams
from kvtier.engine.loop import EngineLoop, Submission
from kvtier.engine.scheduler import SchedulerLimits
from kvtier.tiers.errors import Busy, ConfigError, TierUnavailableError

from .test_families import stock, tiny
from .test_scheduler import check_end, open_engine, prompt_of


class Heard:
    """What one submission said."""

    def __init__(self, n: int = 1, stop_after: int | None = None) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.ends: dict[int, tuple[str, BaseException | None]] = {}
        self.logprobs, self._stop_after = [], stop_after
        self._done = threading.Event()

    def on_token(self, index, token, logprob) -> bool:
        self.tokens[index].append(token)
        self.logprobs.append(logprob)
        return self._stop_after is not None and len(self.tokens[index]) >= self._stop_after

    def on_end(self, index, output, error) -> None:
        self.ends[index] = (output.finish_reason, error)
        if len(self.ends) == len(self.tokens):
            self._done.set()

    def wait(self) -> Heard:
        assert self._done.wait(120)
        return self


class Slow(Heard):
    """Holds the engine at its tokens until `go`: what was submitted with it still runs until then."""

    def __init__(self, go: threading.Event | None = None) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), go or threading.Event()

    def on_token(self, *said) -> bool:
        self.begun.set()
        self.go.wait(60)
        return super().on_token(*said)


def submit_together(loop: EngineLoop, prompts: list[list[int]], max_tokens: int, heard: list) -> list[Submission]:
    """All are scheduled before the first step, so that a listener may hold the engine."""
    began, go = threading.Event(), threading.Event()
    loop.tell(lambda engine: (began.set(), go.wait(60)))
    assert began.wait(60)  # between two steps
    params = SamplingParams(max_tokens=max_tokens)
    asked = [
        loop.start_request(lambda engine, prompt=prompt: engine.request(prompt, params), one)
        for prompt, one in zip(prompts, heard, strict=True)
    ]
    go.set()
    return [one.result(60) for one in asked]


def close_held(loop: EngineLoop, go: threading.Event) -> None:
    """Close a loop that is held until `go`."""
    closing = threading.Thread(target=loop.close)
    closing.start()
    while not loop._is_closing:
        time.sleep(0.001)
    go.set()
    closing.join(60)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def test_requests_of_many_threads_are_served_together(llama):
    wanted = [stock(llama, prompt_of(20 + i, i), 8) for i in range(12)]
    with open_engine(llama, 30) as engine:
        loop, heard = EngineLoop(engine), [Heard() for _ in range(12)]

        def client(i: int) -> None:
            loop.submit(prompt_of(20 + i, i), SamplingParams(max_tokens=8), heard[i])

        threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [one.wait().tokens[0] for one in heard] == wanted
        assert all(one.ends == {0: ("length", None)} for one in heard)
        loop.close()
        check_end(engine)


def test_a_listener_stops_an_output_and_hears_all_n_of_them(llama):
    wanted = stock(llama, prompt_of(20, 1), 5)
    with open_engine(llama) as engine:
        loop = EngineLoop(engine)
        cut = Heard(stop_after=3)
        loop.submit(prompt_of(20, 1), SamplingParams(max_tokens=5), cut)
        assert cut.wait().tokens[0] == wanted[:3] and cut.ends[0] == ("stop", None)
        three = Heard(3)
        loop.submit(prompt_of(20, 1), SamplingParams(max_tokens=5, n=3, temperature=1.0, logprobs=1), three)
        assert all(len(tokens) == 5 for tokens in three.wait().tokens)
        assert all(entry is not None for entry in three.logprobs)
        loop.close()
        check_end(engine)


def test_cancelling_ends_soon_and_leaks_nothing(llama):
    with open_engine(llama) as engine:
        loop, go = EngineLoop(engine), threading.Event()
        heard = [Slow(go) for _ in range(4)]
        going = submit_together(loop, [prompt_of(30, i) for i in range(4)], 300, heard)
        for submission in going:
            submission.cancel()
        go.set()
        assert all(one.wait().ends[0][0] == "cancelled" for one in heard)
        going[0].cancel()
        loop.close()
        check_end(engine)


def test_closing_tells_everybody_who_waits(llama):
    with open_engine(llama) as engine:
        loop, heard = EngineLoop(engine), Slow()
        loop.submit(prompt_of(30, 1), SamplingParams(max_tokens=400), heard)
        close_held(loop, heard.go)
        assert heard.wait().ends[0][0] == "cancelled"
        with pytest.raises(TierUnavailableError, match="ended"):
            loop.submit([1, 2], SamplingParams(), Heard())
        check_end(engine)


def test_refusals_come_back_to_who_asked(llama):
    with open_engine(llama) as engine:
        loop = EngineLoop(engine, max_waiting=0)
        with pytest.raises(Busy, match="wait already"):
            loop.submit_request(lambda e: pytest.fail("made, and nobody waits for it"), Heard())
        loop.close()
        loop = EngineLoop(engine, max_waiting=1)
        with pytest.raises(ConfigError, match="longer than all tiers"):
            loop.submit([1] * 100_000, SamplingParams(), Heard())
        with pytest.raises(ConfigError, match="at least one token"):
            loop.submit([], SamplingParams(max_tokens=0), Heard())
        assert loop.call(lambda e: e.pager.block_size).result() == 16
        loop.close()
        check_end(engine)


def test_a_step_that_fails_ends_its_requests_and_the_loop_goes_on(llama, monkeypatch):
    wanted = stock(llama, prompt_of(20, 2), 4)
    with open_engine(llama) as engine:
        loop, plain = EngineLoop(engine), engine._runner.forward

        def broken(*args):
            raise RuntimeError("the model broke")

        monkeypatch.setattr(engine._runner, "forward", broken)
        heard = Heard()
        loop.submit(prompt_of(20, 1), SamplingParams(max_tokens=4), heard)
        reason, error = heard.wait().ends[0]
        assert reason == "error" and "the model broke" in str(error)
        monkeypatch.setattr(engine._runner, "forward", plain)
        again = Heard()
        loop.submit(prompt_of(20, 2), SamplingParams(max_tokens=4), again)
        assert again.wait().tokens[0] == wanted
        loop.close()
        check_end(engine)


def test_the_end_of_a_prompt_is_told_once_while_its_sequence_can_be_forked(llama):
    wanted = stock(llama, prompt_of(100, 1), 3)
    with open_engine(llama) as engine:
        loop, heard, seen = EngineLoop(engine), Heard(), []

        def on_prompt(request) -> None:
            pager = engine.pager
            seen.append((pager.num_computed(request.seq), len(request.output.token_ids)))
            pager.finish(pager.fork(request.seq))

        def make(engine):
            request = engine.request(prompt_of(100, 1), SamplingParams(max_tokens=3))
            request.on_prompt = on_prompt
            return request

        submission = loop.start_request(make, heard).result()
        assert submission.first.prompt_tokens == 100
        assert heard.wait().tokens[0] == wanted and seen == [(100, 0)]
        loop.close()
        check_end(engine)


def test_whoever_calls_again_and_again_keeps_nobody_from_their_tokens(llama):
    with open_engine(llama) as engine:
        loop, heard, calls = EngineLoop(engine), Heard(), []

        def again(engine) -> None:
            calls.append(len(heard.tokens[0]))
            if not heard.ends and len(calls) < 1000:
                loop.tell(again)

        def make(engine):
            again(engine)
            return engine.request(prompt_of(20, 1), SamplingParams(max_tokens=5))

        loop.start_request(make, heard).result()
        assert heard.wait().ends[0][0] == "length"
        loop.close()
        assert max(map(calls.count, calls)) <= 3, calls  # between two tokens
        check_end(engine)


def test_cancel_all_ends_what_runs_and_what_waits(llama):
    with open_engine(llama, 40, limits=SchedulerLimits(max_active=2)) as engine:
        loop, go = EngineLoop(engine), threading.Event()
        heard = [Slow(go) for _ in range(6)]
        submit_together(loop, [prompt_of(60, i) for i in range(6)], 400, heard)
        loop.cancel_all()
        go.set()
        assert all(one.wait().ends[0][0] == "cancelled" for one in heard)
        assert loop.is_running
        loop.close()
        assert not loop.is_running
        check_end(engine)


def test_a_request_that_comes_while_the_loop_ends_hears_of_its_end(llama):
    with open_engine(llama, 30) as engine:
        loop, heard, slow = EngineLoop(engine), Heard(), Slow()

        def make(engine):
            return engine.request(prompt_of(20, 1), SamplingParams(max_tokens=5))

        loop.start_request(make, slow)
        assert slow.begun.wait(60)  # a step is under way, and nothing is looked at before it is over
        asked = loop.start_request(make, heard)
        close_held(loop, slow.go)
        assert asked.result(60).first.is_done and heard.wait().ends[0][0] == "cancelled"
        asked.result().cancel()  # harmless
        check_end(engine)


def test_a_call_is_answered_or_refused_but_never_forgotten(llama):
    """The loop ends between somebody's look whether it runs and his call's coming into the queue."""
    with open_engine(llama, 30) as engine:
        loop = EngineLoop(engine)
        closing, put = threading.Thread(target=loop.close), loop._calls.put

        class Slow:
            get_nowait, qsize = loop._calls.get_nowait, loop._calls.qsize

            @staticmethod
            def put(fn) -> None:
                closing.start()
                loop._thread.join(0.5)  # it ends, unless it has to wait for this call
                put(fn)

        loop._calls = Slow()
        assert loop.call(lambda engine: "answered").result(60) == "answered"
        closing.join(60)
        with pytest.raises(TierUnavailableError):
            loop.call(lambda engine: None)
