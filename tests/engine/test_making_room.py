"""Who makes room, how, and who comes back first: decided by what bringing back and computing again were measured to cost."""

from __future__ import annotations

import pytest

from kvtier import SamplingParams
from kvtier.engine.scheduler import Scheduler, SchedulerLimits
from kvtier.tiers.errors import ConfigError

from .test_families import stock, tiny
from .test_scheduler import Clock, check_end, drop_all, open_engine, prompt_of, run_with_clock, submit


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize(("compute_s", "is_parked"), [(10.0, True), (1e-15, False)])
def test_parked_or_computed_again_whichever_was_measured_to_be_cheaper(llama, monkeypatch, compute_s, is_parked):
    monkeypatch.setattr(Scheduler, "prefill_s_per_token", property(lambda self: compute_s))
    wanted = [stock(llama, prompt_of(100, i), 20) for i in range(3)]
    with open_engine(llama, 12, limits=SchedulerLimits(quantum_s=0.75)) as engine:
        requests = [submit(engine, 100, i, 20) for i in range(3)]
        run_with_clock(engine, requests)
        assert [request.output.token_ids for request in requests] == wanted
        assert engine.scheduler.num_preempted > 0
        assert (engine.scheduler.num_discarded == 0) == is_parked
        assert (sum(request.usage.recomputed_tokens for request in requests) == 0) == is_parked
        drop_all(engine, requests)


def test_the_rates_are_those_of_steps_and_copies(llama):
    with open_engine(llama) as engine:
        pager, request = engine.pager, submit(engine, 100, 1)
        scheduler = Scheduler(pager, 48)
        assert scheduler.prefill_s_per_token == 0.0
        scheduler.ran([(request, 40)], 2.0)
        assert scheduler.prefill_s_per_token == pytest.approx(0.05)
        scheduler.ran([(request, 1)], 9.0)  # a decode says nothing of prompts
        assert scheduler.prefill_s_per_token == pytest.approx(0.05)
        scheduler.ran([(request, 40)], 4.0)
        assert 0.05 < scheduler.prefill_s_per_token < 0.1  # the later step counts for more
        engine.run([request])
        session = engine.session("a")
        session.send(prompt_of(100, 2), SamplingParams(max_tokens=1))
        unmeasured = pager.seconds_to_bring_back(session.seq)
        pager.counters.add("moved_bytes", 8e3, direction="host_to_device", reason="demand")
        pager.counters.add("move_seconds", 2.0, direction="host_to_device", reason="demand")
        assert pager.seconds_to_bring_back(session.seq) == pytest.approx(7 * pager.layouts[0].block_bytes / 4e3)
        assert unmeasured < 1e-3
        session.close()
        check_end(engine)


def test_the_cheapest_to_bring_back_makes_room(llama):
    with open_engine(llama, 12, limits=SchedulerLimits(quantum_s=0.15)) as engine:
        clock = engine.scheduler.clock = Clock()
        large, small, late = (submit(engine, n, n, 30) for n in (91, 30, 90))
        for request in (large, small):
            engine.scheduler.add(request)
        while small not in engine.scheduler.active:
            engine.step()
        engine.scheduler.add(late)
        while not (large.num_preempted or small.num_preempted):
            engine.step()
            clock.now_s += 0.1
        assert (large.num_preempted, small.num_preempted) == (0, 1)
        for request in (large, small, late):
            request.is_cancelled = True
        engine.step()
        drop_all(engine, [large, small, late])


def test_who_ran_before_comes_back_before_anyone_new(llama):
    with open_engine(llama, 16, limits=SchedulerLimits(quantum_s=0.25)) as engine:
        clock = engine.scheduler.clock = Clock()
        running = [submit(engine, 90, i, 60) for i in range(2)]
        new = [submit(engine, 90, 10 + i, 60) for i in range(2)]
        for request in (*running, *new):
            engine.scheduler.add(request)
        while new[0].admitted_s is None:  # one of the two has made room for it; new[1] has waited longer than that one
            engine.step()
            clock.now_s += 0.1
        (back,) = [request for request in running if request.num_preempted]
        while back.admitted_s is None and new[1].admitted_s is None:
            engine.step()
            clock.now_s += 0.1
        assert back.admitted_s is not None and new[1].admitted_s is None
        for request in (*running, *new):
            request.is_cancelled = True
        engine.step()
        drop_all(engine, [*running, *new])


@pytest.mark.parametrize("compute_s", [1e-300, 1e-15])
def test_turns_of_no_length_and_free_computing_still_get_everybody_to_the_end(llama, monkeypatch, compute_s):
    """A request that would be discarded before it gained anything would take turns with the other one for ever."""
    monkeypatch.setattr(Scheduler, "prefill_s_per_token", property(lambda self: compute_s))
    with open_engine(llama, 12, limits=SchedulerLimits(quantum_s=0.0)) as engine:
        requests = [submit(engine, 100, i, 4) for i in range(3)]  # prompts of three steps each
        run_with_clock(engine, requests)
        assert all(len(request.output.token_ids) == 4 for request in requests)
        assert engine.scheduler.num_discarded > 0
        drop_all(engine, requests)


@pytest.mark.parametrize("namespaces", [("a", "a", "a"), ("a", "b", "c")])
def test_where_nothing_can_be_parked_requests_do_not_forget_each_others_blocks_for_ever(llama, namespaces):
    """Prompts of three steps each, and turns of one step: who made room has lost everything when its turn comes."""
    wanted = [stock(llama, prompt_of(100, i), 4) for i in range(3)]
    with open_engine(llama, 12, host=0, limits=SchedulerLimits(quantum_s=0.05)) as engine:
        requests = [submit(engine, 100, i, 4, namespace=name) for i, name in enumerate(namespaces)]
        run_with_clock(engine, requests)
        assert [request.output.token_ids for request in requests] == wanted
        drop_all(engine, requests)


@pytest.mark.parametrize(
    "limits",
    [dict(quantum_s=-1.0), dict(quantum_s=float("nan")), dict(aging_s=0.0), dict(max_active=0), dict(draft_tokens=-1)],
)
def test_limits_that_cannot_be_kept_are_refused_by_name(limits):
    with pytest.raises(ConfigError, match=f"{next(iter(limits))}="):
        SchedulerLimits(**limits)
