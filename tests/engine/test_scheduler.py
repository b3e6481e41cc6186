"""Many requests on a small device tier: the same tokens as alone, everybody's turn comes, nothing leaks."""

from __future__ import annotations

import pytest
import torch

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine.hf import discover
from kvtier.engine.request import Request
from kvtier.engine.scheduler import SchedulerLimits
from kvtier.tiers.errors import Busy, ConfigError, TierFullError
from kvtier.tiers.owners import SALT_MARK

from .test_families import stock, tiny

BLOCK = 16
TURNS = SchedulerLimits(quantum_s=0.0, aging_s=1e-9)  # who has waited at all takes the room of who has run at all


def config_of(model, blocks: int, host: int = 200, **settings) -> PagerConfig:
    size = sum(layout.block_bytes for layout in discover(model).layouts(BLOCK))
    return PagerConfig(device_bytes=blocks * size, host_bytes=host * size, backend="cpu", staging_bytes=0, **settings)


def open_engine(model, blocks=30, host=200, limits=None, draft=None, **settings) -> Engine:
    config = config_of(model, blocks, host, **settings)
    return Engine.from_model(model, config, block_size=BLOCK, max_batch_tokens=48, limits=limits, draft=draft)


def prompt_of(n: int, seed: int) -> list[int]:
    return torch.randint(1, 512, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def check_end(engine: Engine) -> None:
    """Nothing left behind: no sequence, no reference, no pin."""
    engine.pager.drain()
    engine.pager.check_integrity()
    assert not engine.pager._core.sequences and not list(engine.scheduler.requests())
    assert all(not (group.directory.refs > 0).any() for group in engine.pager._core.groups)
    assert all(not group.pages.pins.any() for group in engine.pager._core.groups)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize(("family", "count"), [("llama", 64), ("qwen2", 24), ("gpt_oss", 24)])
def test_many_requests_say_what_each_says_alone(family, count):
    model = tiny(family)
    prompts = [prompt_of(10 + 3 * (i % 17), i) for i in range(count)]
    wanted = [stock(model, prompt, 6) for prompt in prompts]
    with open_engine(model, 40, limits=TURNS) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=6))
        assert [out.token_ids for out in outputs] == wanted
        assert engine.scheduler.num_preempted > 0
        check_end(engine)


def test_who_makes_room_goes_on_where_it_stopped(llama):
    prompts = [prompt_of(100, i) for i in range(4)]
    wanted = [stock(llama, prompt, 40) for prompt in prompts]
    with open_engine(llama, 16, limits=TURNS) as engine:
        requests = [engine.request(prompt, SamplingParams(max_tokens=40)) for prompt in prompts]
        run_with_clock(engine, requests, step_s=10.0)  # more than any measured cost of making room
        assert [request.output.token_ids for request in requests] == wanted
        assert engine.scheduler.num_preempted > 4
        recomputed = sum(request.output.usage.recomputed_tokens for request in requests)
        assert recomputed == 0 or engine.scheduler.num_discarded > 0
        drop_all(engine, requests)


def test_without_a_lower_tier_somebody_computes_again_and_nobody_fails(llama):
    prompts = [prompt_of(60, i) for i in range(6)]
    wanted = [stock(llama, prompt, 30) for prompt in prompts]
    with open_engine(llama, 12, host=0) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=30))
        assert [out.token_ids for out in outputs] == wanted
        check_end(engine)


def test_one_that_finds_no_room_ends_with_an_error_and_the_others_go_on(llama):
    wanted = stock(llama, prompt_of(20, 20), 4)
    with open_engine(llama, 8, host=0) as engine:
        session = engine.session("holds five of eight pages")
        session.send(prompt_of(70, 1), SamplingParams(max_tokens=1))
        large, small = (engine.request(prompt_of(n, n), SamplingParams(max_tokens=4)) for n in (60, 20))
        with pytest.raises(TierFullError, match="raise host_bytes"):
            engine.run([large, small])
        assert large.output.finish_reason == "error"
        assert small.output.token_ids == wanted
        session.close()
        assert len(engine.generate([prompt_of(60, 60)], SamplingParams(max_tokens=4))[0].token_ids) == 4
        check_end(engine)


def test_who_waits_for_a_disk_in_vain_ends_alone(llama, monkeypatch):
    """Its lease is given up a few times; meanwhile and afterwards the others take their steps."""
    wanted = [stock(llama, prompt_of(20, i), 6) for i in range(3)]
    with open_engine(llama) as engine:
        stuck, *others = (submit(engine, 20, i, 6) for i in (9, 0, 1, 2))
        lease = engine.pager.lease

        def leased(spans, **options):
            if any(span.seq == stuck.seq for span in spans):
                raise Busy("lease: still waiting", retry_after_s=0.1)
            return lease(spans, **options)

        monkeypatch.setattr(engine.pager, "lease", leased)
        with pytest.raises(Busy, match="still waiting"):
            engine.run([stuck, *others])
        assert stuck.output.finish_reason == "error"
        assert [request.output.token_ids for request in others] == wanted
        drop_all(engine, [stuck, *others])


# ---------------------------------------------------------------------- prefixes
def test_requests_with_one_prefix_compute_it_once(llama):
    prefix = prompt_of(96, 0)
    prompts = [[*prefix, *prompt_of(5, 10 + i)] for i in range(4)]
    wanted = [stock(llama, prompt, 3) for prompt in prompts]
    with open_engine(llama, 60) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=3))
        assert [out.token_ids for out in outputs] == wanted
        assert engine.pager.counters.get("computed_tokens") == 96 + 4 * 5 + 4 * 2
        assert sorted(out.usage.cached_tokens for out in outputs) == [0, 96, 96, 96]
        check_end(engine)


# ---------------------------------------------------------------------- whose turn it is
def run_with_clock(engine: Engine, requests: list[Request], step_s: float = 0.1, until: int = 0) -> list[Request]:
    """Step until all are done (or so many, where they have twins or beams), a tenth of a second each; who ended, in order."""
    clock = engine.scheduler.clock = Clock()
    ended: list[Request] = []
    for request in requests:
        engine.scheduler.add(request)
    for _ in range(3000):
        ended += engine.step()
        clock.now_s += step_s
        if len(ended) == (until or len(requests)):
            return ended
    raise AssertionError("some request never ended")


def submit(engine: Engine, n: int, seed: int, tokens: int = 4, **options) -> Request:
    return engine.request(prompt_of(n, seed), SamplingParams(max_tokens=tokens), **options)


def drop_all(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.drop(request)
    check_end(engine)


def test_a_higher_priority_goes_first_and_takes_room(llama):
    with open_engine(llama, 12) as engine:
        low = [submit(engine, 90, i, 20) for i in range(3)]
        high = submit(engine, 90, 9, 4, priority=5)
        ended = run_with_clock(engine, [*low, high])
        assert ended[0] is high
        drop_all(engine, ended)


def test_nobody_starves_behind_a_stream_of_more_important_requests(llama):
    limits = SchedulerLimits(quantum_s=0.5, aging_s=2.0)
    with open_engine(llama, 12, limits=limits) as engine:
        clock = engine.scheduler.clock = Clock()
        poor = submit(engine, 80, 1)
        engine.scheduler.add(poor)
        alive, number = [], 100
        while not poor.is_done:
            assert clock.now_s < 60.0, "the wait has no bound"
            while len([r for r in alive if not r.is_done]) < 3:
                alive.append(submit(engine, 80, number, 8, priority=2))
                engine.scheduler.add(alive[-1])
                number += 1
            engine.step()
            clock.now_s += 0.1
        for request in alive:
            request.is_cancelled = True
        engine.step()
        drop_all(engine, [poor, *alive])


@pytest.mark.parametrize("salt", ["", SALT_MARK + "{}"])  # a salt for each request makes none of them somebody new
def test_a_namespace_with_many_requests_does_not_delay_one_with_few(llama, salt):
    with open_engine(llama, 14) as engine:
        many = [submit(engine, 90, i, namespace="many" + salt.format(i)) for i in range(8)]
        few = submit(engine, 90, 50, namespace="few")
        ended = run_with_clock(engine, [*many, few])
        assert ended.index(few) <= 2
        drop_all(engine, ended)


def test_cancelled_and_late_requests_end_and_give_everything_back(llama):
    wanted = stock(llama, prompt_of(40, 2), 30)
    with open_engine(llama, 14) as engine:
        clock = engine.scheduler.clock = Clock()
        gone, late, good = (submit(engine, 40, i, 30) for i in range(3))
        late.deadline_s = 1.0
        for request in (gone, late, good):
            engine.scheduler.add(request)
        for _ in range(3):
            engine.step()
        gone.is_cancelled, clock.now_s = True, 2.0
        while not good.is_done:
            engine.step()
        assert (gone.output.finish_reason, late.output.finish_reason) == ("cancelled", "deadline")
        assert good.output.token_ids == wanted
        drop_all(engine, [gone, late, good])


def test_what_waits_for_copies_does_not_hold_up_the_others(llama, tmp_path):
    from kvtier.tiers.cpu import CpuBackend

    with open_engine(llama, 40, nvme_path=tmp_path / "s", nvme_bytes="64MiB") as engine:
        session = engine.session("parked")
        session.send(prompt_of(300, 1), SamplingParams(max_tokens=1))
        session.park()
        assert isinstance(engine.pager.backend, CpuBackend)
        engine.generate([prompt_of(500, 2)], SamplingParams(max_tokens=1))  # the parked blocks leave device and host
        session.resume()
        engine.pager.append(session.seq, [5])
        slow = engine.continue_request(session.seq, 1, SamplingParams(max_tokens=2))
        quick = submit(engine, 10, 3, 2)
        for request in (slow, quick):
            engine.scheduler.add(request)
        while not (slow.is_done and quick.is_done):
            engine.step()
        assert len(slow.output.token_ids) == len(quick.output.token_ids) == 2
        session.close()
        drop_all(engine, [quick])


def test_twins_have_the_deadline_of_the_first(llama):
    with open_engine(llama, 30) as engine:
        request = engine.request(prompt_of(40, 1), SamplingParams(max_tokens=200, n=3), deadline_s=1.0)
        ended = run_with_clock(engine, [request], until=3)
        assert {id(one) for one in ended} == {id(one) for one in (request, *request.twins)}
        assert all(one.output.finish_reason == "deadline" and 8 <= len(one.output.token_ids) <= 11 for one in ended)
        drop_all(engine, ended)


# ---------------------------------------------------------------------- speculation
def repetitive(n: int) -> list[int]:
    return (prompt_of(12, 3) * 20)[:n]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ngram_speculation_changes_speed_and_no_token(family, temperature):
    model = tiny(family)
    plain = SamplingParams(max_tokens=40, temperature=temperature, seed=3, logprobs=2)
    drafted = SamplingParams(max_tokens=40, temperature=temperature, seed=3, logprobs=2, speculation="ngram")
    prompts = [repetitive(100), prompt_of(33, 5), repetitive(20)]
    with open_engine(model, 60) as engine:
        wanted = engine.generate(prompts, plain, namespace="a")
    with open_engine(model, 60) as engine:
        found = engine.generate(prompts, drafted, namespace="a")
        assert [out.token_ids for out in found] == [out.token_ids for out in wanted]
        if temperature == 0:
            assert sum(out.usage.accepted_tokens for out in found) > 0
        for a, b in zip(found, wanted, strict=True):
            assert [entry.token for entry in a.logprobs] == b.token_ids
            assert [e.logprob for e in a.logprobs] == pytest.approx([e.logprob for e in b.logprobs], abs=1e-3)
        check_end(engine)


def test_a_draft_model_without_room_for_the_context_drafts_nothing(llama):
    wanted = [stock(llama, prompt_of(n, n), 12) for n in (200, 30)]
    with open_engine(llama, 8, host=0) as draft, open_engine(llama, 40, draft=draft) as engine:
        requests = [
            engine.request(prompt_of(200, 200), SamplingParams(max_tokens=12, speculation="model")),
            engine.request(prompt_of(30, 30), SamplingParams(max_tokens=12)),
        ]
        engine.run(requests)
        assert [request.output.token_ids for request in requests] == wanted
        assert requests[0].usage.drafted_tokens == 0
        drop_all(engine, requests)
        check_end(draft)


def test_a_draft_model_proposes_and_the_target_decides(llama):
    prompts = [prompt_of(30, 1), prompt_of(45, 2)]
    wanted = [stock(llama, prompt, 20) for prompt in prompts]
    with open_engine(llama, 30) as draft, open_engine(llama, 40, draft=draft) as engine:
        params = SamplingParams(max_tokens=20, speculation="model")
        outputs = engine.generate(prompts, params)
        assert [out.token_ids for out in outputs] == wanted
        usage = [out.usage for out in outputs]  # the draft model is the target itself: nearly all of it is right
        assert all(u.accepted_tokens > 0.8 * u.drafted_tokens > 0 for u in usage)
        check_end(engine)
        check_end(draft)
    with open_engine(tiny("qwen3"), 30) as draft, open_engine(llama, 40, draft=draft) as engine:
        assert [out.token_ids for out in engine.generate(prompts, params)] == wanted
        check_end(engine)


def test_a_draft_that_cannot_run_yet_is_taken_back(llama, monkeypatch):
    prompt, other = repetitive(60), prompt_of(33, 5)
    wanted = [stock(llama, prompt, 20), stock(llama, other, 20)]
    with open_engine(llama, 60) as engine:
        first = engine.request(prompt, SamplingParams(max_tokens=20, speculation="ngram"))
        second = engine.request(other, SamplingParams(max_tokens=20))
        plain, calls = engine.pager.bring_up, [0]

        def sometimes_late(seq: int) -> int:
            calls[0] += 1
            missing = plain(seq)
            return 1 if seq == first.seq and calls[0] % 3 == 0 else missing

        monkeypatch.setattr(engine.pager, "bring_up", sometimes_late)
        took = engine.scheduler.plan

        def plan() -> list:
            work = took()
            ran = {id(request) for request, _ in work}
            assert all(not r.draft for r in engine.scheduler.requests() if id(r) not in ran)
            return work

        monkeypatch.setattr(engine.scheduler, "plan", plan)
        engine.run([first, second])
        assert [first.output.token_ids, second.output.token_ids] == wanted
        check_end(engine)


def test_speculation_stops_at_a_stop_token(llama):
    prompt = repetitive(60)
    whole = stock(llama, prompt, 30)
    stop = whole[17]
    with open_engine(llama, 40) as engine:
        params = SamplingParams(max_tokens=30, stop_token_ids=(stop,), speculation="ngram")
        out = engine.generate([prompt], params)[0]
        assert out.token_ids == whole[: whole.index(stop) + 1] and out.finish_reason == "stop"
        session = engine.session("a")
        session.send(prompt, params)
        assert session.token_ids == [*prompt, *out.token_ids]
        session.close()
        check_end(engine)


def test_a_drafter_that_is_not_there_is_said(llama):
    with open_engine(llama) as engine:
        with pytest.raises(ConfigError, match="draft model"):
            engine.generate([[1, 2]], SamplingParams(speculation="model"))
        with pytest.raises(ConfigError, match="speculation='magic'"):
            SamplingParams(speculation="magic")
        check_end(engine)
