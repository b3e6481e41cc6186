from __future__ import annotations

import numpy as np

from kvtier.pager.policies.registry import Setting, make_policy
from kvtier.tools.replay.hindsight import best_release_rule, shares_of
from kvtier.tools.replay.oracles import next_uses
from kvtier.tools.replay.simulate import simulate
from kvtier.tools.replay.trace import Recorded, trace_of


def two_kinds(sessions: int):
    """Short prompts are never gone on from, long ones always are, once; both fill the cache."""
    lines, ids = [], 0
    for number in range(sessions):
        at_ms = 1000.0 * number
        short, long = tuple(range(ids, ids + 2)), tuple(range(ids + 10, ids + 14))
        lines.append(Recorded(at_ms, short, 32, 10, False))
        lines.append(Recorded(at_ms + 1, long, 64, 10, False))
        lines.append(Recorded(at_ms + 20_000, (*long, ids + 14), 80, 10, False))
        ids += 100
    lines.sort(key=lambda one: one.at_ms)
    return trace_of("two kinds", lines, 16)


def test_cells_tell_kinds_apart_and_the_rule_gains_what_they_tell():
    trace = two_kinds(120)
    uses = next_uses(trace)
    shares = shares_of(trace, uses)
    first_turns = {one.input_tokens: set() for one in trace.requests}
    for share, one in zip(shares, trace.requests, strict=True):
        first_turns[one.input_tokens].add(round(float(share), 6))
    assert first_turns == {32: {0.0}, 64: {1.0}, 80: {0.0}}
    capacity = 84  # what twenty sessions that go on need, and little more
    plain = simulate(trace, make_policy("lru", Setting(capacity, 16)), capacity).token_hit_rate(trace)
    assert best_release_rule(trace, capacity, shares) > plain + 0.2


def test_where_nothing_tells_them_apart_all_are_alike():
    lines = [Recorded(1000.0 * n, tuple(range(10 * n, 10 * n + 4)), 64, 10, False) for n in range(100)]
    lines += [
        Recorded(1e6 + 1000.0 * n, (*range(10 * n, 10 * n + 4), 5000 + n), 80, 10, False) for n in range(0, 100, 2)
    ]
    trace = trace_of("coins", lines, 16)
    shares = shares_of(trace, next_uses(trace))
    assert np.allclose(shares[:100], 0.5)
