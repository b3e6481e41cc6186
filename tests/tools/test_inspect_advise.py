"""Advice: policies tried on a sample say what they would say of everything; times come from measured rates or not at all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from kvtier.pager.inspection.advice import _sample
from kvtier.pager.inspection.reuse import MAX_LOGGED, ReuseSampler
from kvtier.pager.policies.registry import Setting, make_policy
from kvtier.tools.inspect.advising import POLICIES, advised
from kvtier.tools.replay.miniature import WARM_UP
from kvtier.tools.replay.simulate import simulate
from kvtier.tools.replay.trace import Recorded, trace_of

from .inspecting import asked, inspect, running


class Told:
    """A pager that saw these requests."""

    def __init__(self, sampler: ReuseSampler, blocks: int) -> None:
        self._sampler, self._blocks = sampler, blocks

    def ask(self, verb: str, **given) -> dict:
        rows = [{"factor": 1.0, "blocks": self._blocks}, {"factor": 4.0, "blocks": 4 * self._blocks}]
        sample = _sample(self._sampler.logged())
        return {"rows": rows, "sample": sample, "block_size": 16, "factor": 2.0, **self._sampler.to_dict()}


def chats(rng: random.Random, requests: int) -> Iterator[list[int]]:
    """Chats that come back often, between prompts that never do."""
    turns: dict[int, int] = {}
    for number in range(requests):
        if rng.random() < 0.5:
            yield [1_000_000 + 40 * number + i for i in range(30)]
        else:
            chat = min(int(rng.paretovariate(0.7)), 400)
            turns[chat] = min(turns.get(chat, 3) + 2, 60)
            yield [1000 * chat + i for i in range(turns[chat])]


def mixed(block: int) -> int:
    return (block * 2654435761 + 12345) % (1 << 32)


def test_policies_on_a_sample_hit_what_they_hit_on_everything():
    requests = list(chats(random.Random(3), 2000))
    sampler = ReuseSampler(max_sampled=4096)
    for number, chain in enumerate(requests):
        sampler.used(np.array([mixed(block) for block in chain], np.uint32), float(number))
    assert sampler.rate < 0.5
    blocks = 2000
    told = advised(Told(sampler, blocks))
    tried = told["rows"][0]["policies"]
    assert set(tried) == set(POLICIES) and told["rows"][1]["policies"] == {} and "sample" not in told
    log = sampler.logged()
    since = int(log[int(WARM_UP * len(log))].time_s)  # only the latest requests are in the sample
    trace = trace_of("all", [Recorded(1e3 * n, tuple(chain), -1, 0, False) for n, chain in enumerate(requests)])
    for policy in POLICIES:
        hits = simulate(trace, make_policy(policy, Setting(blocks, 16)), blocks).hit_blocks[since:].sum()
        wanted = hits / sum(map(len, requests[since:]))
        assert abs(tried[policy] - wanted) < 0.06, (policy, tried[policy], wanted)


def test_the_log_of_uses_is_bounded_and_follows_the_sample():
    sampler = ReuseSampler(max_sampled=256)
    for number in range(2000):
        sampler.used(np.array([mixed(16 * number + i) for i in range(16)], np.uint32), float(number))
    log = sampler.logged()
    assert sum(len(use.tags) for use in log) <= MAX_LOGGED and log[-1].time_s > 1900
    assert all((use.tags < sampler.rate * (1 << 32)).all() for use in log)


@pytest.fixture(scope="module")
def pager(tmp_path_factory):
    with running(tmp_path_factory.mktemp("p"), device_bytes="160KiB") as one:
        one.do("[pager.finish(compute([n] * 400)) for _ in range(3) for n in range(12)]")
        yield one


def test_without_an_answered_request_there_is_no_estimate_of_time(tmp_path):
    with running(tmp_path) as pager:
        pager.do("[pager.finish(compute([n] * 400)) for n in range(3)]")
        told = asked(pager, "advise")
    assert told["measured_ttft_s"] is None and {row["ttft_s"] for row in told["rows"]} == {None}
    assert "sample" not in told


def test_time_to_first_token_falls_with_memory_and_is_the_measured_one_at_this_size(pager):
    pager.do(
        "s = compute([99] * 400)\n"
        "pager.note_request(s, name='r', age_s=2.0, outcome='stop', lines_s={'ttft_s': 1.5, 'prefill': 1.5},\n"
        "                   usage={'prompt_tokens': 400, 'cached_tokens': 0, 'prefill_s_per_token': 0.002})\n"
        "pager.finish(s)\n"
        "for way in ('host_to_device', 'nvme_to_host'):  # copies that cost next to nothing, whatever the machine\n"
        "    core.counters.add('moved_bytes', 1e15, direction=way, reason='demand')"
    )
    told = asked(pager, "advise", "--factor", "8")
    times = [row["ttft_s"] for row in told["rows"]]
    assert all(before >= after - 1e-9 for before, after in pairwise(times)) and times[-1] < times[0]
    (now_s,) = [row["ttft_s"] for row in told["rows"] if row["factor"] == 1]
    assert now_s == pytest.approx(
        1.5, rel=0.35
    )  # what the model does not explain stays; never more than measured by much
    shown = inspect("-s", pager.where, "advise").stdout
    assert "TTFT est." in shown and "measured 1,500 ms now" in shown


def test_policies_are_columns_where_the_memory_is_large_enough_to_try_them(pager):
    told = asked(pager, "advise", "--tier", "nvme")
    by_factor = {row["factor"]: row["policies"] for row in told["rows"]}
    assert set(by_factor[1.0]) == set(by_factor[2.0]) == set(POLICIES) and by_factor[4.0] == {}
    assert all(0 <= rate <= 1 for rate in by_factor[1.0].values())
    shown = inspect("-s", pager.where, "advise", "--tier", "nvme").stdout
    assert all(name in shown for name in POLICIES) and "is at work" in shown
