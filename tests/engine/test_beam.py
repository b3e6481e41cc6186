"""Beam search says what transformers' says, beside other requests and on few pages."""

from __future__ import annotations

import pytest
import torch

from kvtier import SamplingParams
from kvtier.engine.scheduler import Scheduler, SchedulerLimits
from kvtier.tiers.errors import ConfigError

from .test_families import stock, tiny
from .test_scheduler import check_end, drop_all, open_engine, prompt_of, run_with_clock


@torch.inference_mode()
def stock_beams(model, prompt, beams, n, new_tokens, stop=None, **kind) -> list[list[int]]:
    out = model.generate(
        torch.tensor([prompt]),
        num_beams=beams,
        num_return_sequences=n,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
        **kind,
    )
    return [row[len(prompt) :].tolist() for row in out]


def cut(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    """Without the padding behind a stop token."""
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize(("beams", "n"), [(2, 1), (4, 4), (5, 2)])
def test_the_beams_of_transformers(family, beams, n):
    model = tiny(family)
    prompts = [prompt_of(30, 1), prompt_of(45, 2)]
    wanted = [stock_beams(model, prompt, beams, n, 12) for prompt in prompts]
    with open_engine(model, 50) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=12, num_beams=beams, n=n))
        assert [out.token_ids for out in outputs] == [tokens for found in wanted for tokens in found]
        scores = [out.score for out in outputs[:n]]
        assert scores == sorted(scores, reverse=True)
        check_end(engine)


@pytest.mark.parametrize("kind", [{}, {"early_stopping": True}, {"length_penalty": 0.2}, {"length_penalty": 2.0}])
def test_beams_that_stop(kind):
    model = tiny("llama")
    prompt = prompt_of(40, 3)
    free = [token for tokens in stock_beams(model, prompt, 4, 4, 12) for token in tokens]
    stop = tuple(sorted({free[4], free[12 + 7], free[-3]}))
    wanted = [cut(tokens, stop) for tokens in stock_beams(model, prompt, 4, 3, 12, list(stop), **kind)]
    with open_engine(model, 50) as engine:
        params = SamplingParams(max_tokens=12, num_beams=4, n=3, stop_token_ids=stop, **kind)
        outputs = engine.generate([prompt], params)
        assert [out.token_ids for out in outputs] == wanted
        assert any(out.finish_reason == "stop" for out in outputs)
        check_end(engine)


def test_beams_beside_others_on_few_pages():
    model = tiny("llama")
    plain, searched = [prompt_of(50 + i, i) for i in range(4)], [prompt_of(40 + i, 10 + i) for i in range(2)]
    wanted = [stock(model, prompt, 10) for prompt in plain], [stock_beams(model, p, 3, 1, 10)[0] for p in searched]
    with open_engine(model, 18, limits=SchedulerLimits(quantum_s=0.0, aging_s=1e-9)) as engine:
        requests = [engine.request(prompt, SamplingParams(max_tokens=10)) for prompt in plain]
        beams = [engine.request(prompt, SamplingParams(max_tokens=10, num_beams=3)) for prompt in searched]
        engine.run([*requests, *beams])
        assert [r.output.token_ids for r in requests] == wanted[0]
        assert [r.output.token_ids for r in beams] == wanted[1]
        check_end(engine)


def test_logits_offered_twice_count_once():
    """A beam that waits for the others is preempted, and computed again in the step in which they come."""
    model, prompt = tiny("llama"), prompt_of(41, 11)
    wanted = stock_beams(model, prompt, 3, 1, 10)
    with open_engine(model, 40) as engine:
        request = engine.request(prompt, SamplingParams(max_tokens=10, num_beams=3))
        engine.scheduler.add(request)
        while len(engine.scheduler.active) < 3:
            engine.step()
        for _ in range(4):
            late, *_, early = engine.scheduler.active
            engine.scheduler.active.remove(late)
            engine.step()  # all but one offer
            for beam in (late, early):
                engine.pager.discard(beam.seq)
            engine.scheduler.active[:0] = [late]
            engine.step()  # that one completes the step, then the last offers what it has offered before
        while not request.is_done:
            engine.step()
        assert request.output.token_ids == wanted[0]
        engine.settle_ended()
        check_end(engine)


@pytest.mark.parametrize("compute_s", [0.0, 1e-15])  # who makes room is parked, or computed again
@pytest.mark.parametrize("priority", [0, 5])
def test_beams_that_wait_make_room_for_the_one_that_they_wait_for(monkeypatch, priority, compute_s):
    monkeypatch.setattr(Scheduler, "prefill_s_per_token", property(lambda self: compute_s))
    model, prompt = tiny("llama"), prompt_of(125, 9)
    wanted, other = stock_beams(model, prompt, 4, 1, 8), stock(model, prompt_of(60, 2), 8)
    with open_engine(
        model, 11, limits=SchedulerLimits(quantum_s=0.15)
    ) as engine:  # all four together need twelve pages
        requests = [
            engine.request(prompt, SamplingParams(max_tokens=8, num_beams=4), priority=priority),
            engine.request(prompt_of(60, 2), SamplingParams(max_tokens=8)),
        ]
        beams = {id(request) for request in run_with_clock(engine, requests, until=5)} - {id(requests[1])}
        assert len(beams) == 4 and engine.scheduler.num_preempted > 0
        assert [request.output.token_ids for request in requests] == [wanted[0], other]
        drop_all(engine, requests)


def test_a_beam_that_has_offered_comes_back_when_it_has_something_to_do():
    model, prompt = tiny("llama"), prompt_of(41, 11)
    wanted = stock_beams(model, prompt, 3, 1, 6)
    with open_engine(model, 40) as engine:
        request, scheduler = engine.request(prompt, SamplingParams(max_tokens=6, num_beams=3)), engine.scheduler
        scheduler.add(request)
        while len(scheduler.active) < 3:
            engine.step()
        early, *_, late = scheduler.active
        scheduler.active.remove(late)
        engine.step()  # all but one offer
        scheduler._preempt(early, (0.0, 1.0))
        engine.step()
        assert early in scheduler.waiting
        scheduler.active.append(late)
        engine.step()  # that one completes the step, and all go on
        engine.step()
        assert early in scheduler.active
        while not request.is_done:
            engine.step()
        assert request.output.token_ids == wanted[0]
        engine.settle_ended()
        check_end(engine)


def test_a_search_that_is_cancelled_leaves_nothing():
    with open_engine(tiny("llama"), 40) as engine:
        request = engine.request(prompt_of(40, 1), SamplingParams(max_tokens=50, num_beams=4, n=2))
        engine.scheduler.add(request)
        for _ in range(6):
            engine.step()
        request.is_cancelled = True
        engine.step()
        assert all(one.output.finish_reason == "cancelled" for one in (request, *request.twins))
        check_end(engine)


@pytest.mark.parametrize("params", [dict(n=3, num_beams=2), dict(num_beams=2, temperature=1.0), dict(num_beams=0)])
def test_beams_that_cannot_be_are_refused(params):
    with pytest.raises(ConfigError, match="num_beams"):
        SamplingParams(**params)
