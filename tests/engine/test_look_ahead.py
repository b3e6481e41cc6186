"""What the scheduler says of its queue to the pager before anybody in it runs."""

from __future__ import annotations

from kvtier import SamplingParams
from kvtier.engine.scheduler import LOOK_AHEAD

from .test_families import tiny
from .test_scheduler import Clock, open_engine, prompt_of


def test_blocks_come_up_in_the_order_of_the_queue_as_it_is_now():
    """Each look names all of them in one call: one at a time, whoever was named first would be served first for good."""
    clock, told = Clock(), []
    with open_engine(tiny("llama")) as engine:
        scheduler = engine.scheduler
        scheduler.clock = clock
        engine.pager.prefetch = told.append
        requests = [engine.request(prompt_of(40, n), SamplingParams(max_tokens=1)) for n in range(LOOK_AHEAD + 2)]
        for request in requests:
            scheduler.add(request)
        scheduler._look_ahead()
        requests[-1].priority = 5
        clock.now_s += 1.0
        scheduler._look_ahead()
        seqs = [request.seq for request in requests]
        assert told == [seqs[:LOOK_AHEAD], [seqs[-1], *seqs[: LOOK_AHEAD - 1]]]
