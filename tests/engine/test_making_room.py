"""Who makes room, how, and who comes back first: decided by what bringing back and computing again were measured to cost."""

from __future__ import annotations

import pytest

from kvtier import SamplingParams
from kvtier.engine.scheduler import Scheduler, SchedulerLimits
from kvtier.pager.pager import Pager
from kvtier.pager.states import PageState
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
    with open_engine(llama, 12, limits=SchedulerLimits(quantum_s=0.75, aging_s=0.1)) as engine:
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
        (unmeasured,) = pager.seconds_to_bring_back([session.seq])
        pager.counters.add("moved_bytes", 8e3, direction="host_to_device", reason="demand")
        pager.counters.add("move_seconds", 2.0, direction="host_to_device", reason="demand")
        assert pager.seconds_to_bring_back([session.seq]) == [pytest.approx(7 * pager.layouts[0].block_bytes / 4e3)]
        assert unmeasured < 1e-3
        session.close()
        check_end(engine)


def test_the_cheapest_to_bring_back_makes_room(llama):
    with open_engine(llama, 11, limits=SchedulerLimits(quantum_s=0.15, aging_s=0.1)) as engine:
        clock = engine.scheduler.clock = Clock()
        large, small, late = (submit(engine, n, n, 30) for n in (91, 30, 60))
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


def test_who_need_not_make_room_does_not_however_cheap(llama):
    with open_engine(llama, 12, limits=SchedulerLimits(quantum_s=0.15, aging_s=0.1)) as engine:
        clock = engine.scheduler.clock = Clock()
        large, small, late = (submit(engine, n, n, 30) for n in (91, 30, 100))
        for request in (large, small, late):
            engine.scheduler.add(request)
        while late.admitted_s is None:
            engine.step()
            clock.now_s += 0.1
        assert (large.num_preempted, small.num_preempted) == (1, 0)
        for request in (large, small, late):
            request.is_cancelled = True
        engine.step()
        drop_all(engine, [large, small, late])


def test_who_ran_before_comes_back_before_anyone_new(llama):
    with open_engine(llama, 16) as engine:
        engine.scheduler.clock = Clock()
        running = [submit(engine, 90, i, 60) for i in range(2)]
        important, new = submit(engine, 90, 10, 3, priority=1), submit(engine, 90, 11, 60)
        for request in (*running, new):
            engine.scheduler.add(request)
        while not all(request.has_run for request in running):
            engine.step()
        engine.scheduler.add(important)
        while not important.is_done:
            engine.step()
        (back,) = [request for request in running if request.num_preempted]
        engine.step()
        assert back.admitted_s is not None and new.admitted_s is None  # which has waited longer
        for request in (*running, new):
            request.is_cancelled = True
        engine.step()
        drop_all(engine, [*running, new, important])


def test_of_equals_the_first_to_come_is_the_first_to_end(llama):
    with open_engine(llama, 16, limits=SchedulerLimits(quantum_s=0.25)) as engine:
        requests = [submit(engine, 90, i, 20) for i in range(5)]  # two at a time
        assert [requests.index(request) for request in run_with_clock(engine, requests)] == [0, 1, 2, 3, 4]
        assert engine.scheduler.num_preempted == 0
        drop_all(engine, requests)


def test_turns_are_as_long_as_the_waits_that_end_them_and_share_these_out(llama):
    """Three where two have room: they change places as often as one of them has waited for a step of priority, no more."""
    limits = SchedulerLimits(quantum_s=0.25, aging_s=1.0)
    with open_engine(llama, 16, limits=limits) as engine:
        clock = engine.scheduler.clock = Clock()
        requests = [submit(engine, 60, i, 60) for i in range(3)]
        for request in requests:
            engine.scheduler.add(request)
        while not any(request.is_done for request in requests):
            engine.step()
            clock.now_s += 0.1
        assert 3 <= engine.scheduler.num_preempted <= clock.now_s / limits.aging_s
        waits = [r.waited_s + (clock.now_s - r.waiting_since_s) * (r.admitted_s is None) for r in requests]
        assert max(waits) - min(waits) < 2.5 * limits.aging_s
        for request in requests:
            request.is_cancelled = True
        engine.step()
        drop_all(engine, requests)


def test_who_needs_the_room_of_two_gets_it_in_one_step_or_leaves_both(llama):
    with open_engine(llama, 12, limits=SchedulerLimits(quantum_s=0.25, aging_s=1.0)) as engine:
        clock = engine.scheduler.clock = Clock()
        small, large = [submit(engine, 60, i, 25) for i in range(2)], submit(engine, 150, 9, 4)
        for request in (*small, large):
            engine.scheduler.add(request)
        while large.admitted_s is None:
            engine.step()
            clock.now_s += 0.1
            assert engine.scheduler.num_preempted in (0, 2)
        assert not any(request.is_done for request in small)
        ended = run_with_clock(engine, [], until=3)
        assert ended[0] is large
        drop_all(engine, [*small, large])


def test_who_was_forgotten_for_want_of_room_comes_back_while_the_others_still_run(llama):
    limits = SchedulerLimits(aging_s=1.0)
    with open_engine(llama, 16, limits=limits) as engine:
        clock = engine.scheduler.clock = Clock()
        needy, forgotten = submit(engine, 60, 1, 60), submit(engine, 60, 2, 60)
        for request in (needy, forgotten):
            engine.scheduler.add(request)
        while not forgotten.has_run:
            engine.step()
        assert engine.scheduler.relieve(needy) and forgotten in engine.scheduler.waiting
        while forgotten.admitted_s is None:
            engine.step()
            clock.now_s += 0.1
        assert clock.now_s >= limits.aging_s and not needy.is_done
        ended = run_with_clock(engine, [], until=2)
        drop_all(engine, ended)


@pytest.mark.parametrize("compute_s", [1e-300, 1e-15])
def test_turns_of_no_length_and_free_computing_still_get_everybody_to_the_end(llama, monkeypatch, compute_s):
    """A request that would be discarded before it gained anything would take turns with the other one for ever."""
    monkeypatch.setattr(Scheduler, "prefill_s_per_token", property(lambda self: compute_s))
    with open_engine(llama, 12, limits=SchedulerLimits(quantum_s=0.0, aging_s=0.1)) as engine:
        requests = [submit(engine, 100, i, 4) for i in range(3)]  # prompts of three steps each
        run_with_clock(engine, requests)
        assert all(len(request.output.token_ids) == 4 for request in requests)
        assert engine.scheduler.num_discarded > 0
        drop_all(engine, requests)


@pytest.mark.parametrize("namespaces", [("a", "a", "a"), ("a", "b", "c")])
def test_where_nothing_can_be_parked_requests_do_not_forget_each_others_blocks_for_ever(llama, namespaces):
    """Prompts of three steps each, and turns of one step: who made room has lost everything when its turn comes."""
    wanted = [stock(llama, prompt_of(100, i), 4) for i in range(3)]
    with open_engine(llama, 12, host=0, limits=SchedulerLimits(quantum_s=0.05, aging_s=0.1)) as engine:
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


@pytest.mark.parametrize("is_early", [True, False])
def test_who_will_soon_have_to_wait_is_copied_down_before(llama, monkeypatch, is_early):
    """Dirty pages, besides the one that is being filled, that a preempted request still had."""
    left: list[int] = []
    preempt = Scheduler._preempt

    def note(self, request, costs_s):
        group = self._pager._core.groups[0]
        ids = self._pager._core.sequence(request.seq).tables[0].ids[:-1]
        left.append(int((group.pages.state[group.directory.page[ids]] == PageState.DIRTY).sum()))
        preempt(self, request, costs_s)

    monkeypatch.setattr(Scheduler, "_preempt", note)
    monkeypatch.setattr("kvtier.pager.pressure.Pressure.foreseen", lambda self: 0)
    if not is_early:
        monkeypatch.setattr(Pager, "make_clean", lambda self, seq: None)
    wanted = [stock(llama, prompt_of(60, i), 60) for i in range(2)]
    with open_engine(llama, 13, low_watermark=0.0, high_watermark=0.0) as engine:
        requests = [submit(engine, 60, i, 60) for i in range(2)]
        for request in requests:
            engine.scheduler.add(request)
        while not all(request.is_done for request in requests):
            engine.step()
            engine.pager.drain()
        assert [request.output.token_ids for request in requests] == wanted
        assert left and (max(left) <= 1 if is_early else min(left) >= 4)  # one that was full only just now
        drop_all(engine, requests)
