"""What `auto` learns, on traffic made so that the right answer is known."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvtier.pager.policies.auto import Auto
from kvtier.pager.policies.base import Policy, Request
from kvtier.pager.policies.lru import Lru
from kvtier.pager.policies.reuse import LEFTOVER, NUM_AGES, NUM_KINDS, LifeTable, Risk, age_bin, age_bins
from kvtier.pager.policies.segments import Segments


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int64)


def hits_of(policy: Policy, requests: list[tuple[float, list[int], int]], capacity: int) -> int:
    """Blocks hit in the second half of these requests, when there was something to learn from."""
    policy.grow(1 + max(max(chain) for _, chain, _ in requests))
    held: set[int] = set()
    total = 0
    for number, (at_s, blocks, tokens) in enumerate(requests):
        was_held = np.array([block in held for block in blocks])
        if number > len(requests) // 2:
            total += len(blocks) if was_held.all() else int(was_held.argmin())
        policy.on_chain(np.array(blocks), was_held, Request(at_s, tokens, 10))
        held |= set(blocks)
        if len(held) > capacity:
            leaving = policy.coldest(len(held) - capacity)
            policy.on_evict(leaving)
            held -= set(leaving.tolist())
        assert len(held) <= capacity
    return total


def two_kinds_of_chats(seed: int) -> list[tuple[float, list[int], int]]:
    """Short prompts come back after about 100 s, long ones never; only their length tells them apart."""
    pick, requests, block = random.Random(seed), [], 0
    for _ in range(1500):
        at_s, is_short = pick.uniform(0, 20_000), pick.random() < 0.4
        chain = list(range(block, block + (6 if is_short else 30)))
        block += 40
        requests.append((at_s, chain, len(chain) * 16))
        for turn in range(4 if is_short else 0):
            at_s += pick.uniform(60, 140)
            chain = [*chain, block + turn]
            requests.append((at_s, chain, len(chain) * 16))
        block += 10
    return sorted(requests)


@pytest.mark.parametrize("seed", [1, 2])
def test_it_learns_which_chains_come_back(seed):
    requests = two_kinds_of_chats(seed)
    auto = Auto(120)
    ours, lru = hits_of(auto, requests, 120), hits_of(Lru(120), requests, 120)
    assert ours > 1.5 * lru
    assert auto.order.name == "density"


def test_recency_stays_in_force_where_nothing_is_better():
    pick, requests, at_s, block = random.Random(3), [], 0.0, 0
    for _ in range(400):  # sessions one after another: whoever was last is next
        for turn in range(6):
            at_s += pick.uniform(1, 5)
            requests.append((at_s, list(range(block, block + 4 + turn)), 0))
        block += 20
    auto = Auto(40)
    ours, lru = hits_of(auto, requests, 40), hits_of(Lru(40), requests, 40)
    assert auto.order.name == "recency" and ours == lru


def test_a_common_beginning_outlives_the_sessions_that_share_it():
    requests, block = [], 10
    for number in range(400):
        requests.append((number * 3.0, [*range(5), *range(block, block + 8)], 0))
        block += 8
    auto = Auto(20)
    assert hits_of(auto, requests, 20) == 5 * 199
    common = np.flatnonzero(auto._segments.is_common[: auto._segments.count])
    assert [auto._segments.chain[c].tolist() for c in common] == [list(range(5))]


def test_it_forgets_when_the_traffic_changes():
    """Short chains come back, then for as long again only long ones do."""
    first = two_kinds_of_chats(5)
    pick, block = random.Random(6), 1 + max(max(chain) for _, chain, _ in first)
    second = []
    for _ in range(1500):
        at_s, is_short = 20_000 + pick.uniform(0, 20_000), pick.random() < 0.6
        chain = list(range(block, block + (6 if is_short else 30)))
        block += 40
        second.append((at_s, chain, len(chain) * 16))
        for turn in range(0 if is_short else 4):
            at_s += pick.uniform(60, 140)
            second.append((at_s, [*chain, *range(block, block + turn + 1)], len(chain) * 16))
        block += 10
    requests = sorted(first + second)
    ours, lru = hits_of(Auto(300), requests, 300), hits_of(Lru(300), requests, 300)
    assert ours > 1.2 * lru


def test_a_use_takes_over_the_front_of_its_predecessor_and_leaves_it_the_rest():
    segments = Segments()
    first = segments.open(ids(1, 2, 3, 4), 0, 0.0)
    chain = ids(1, 2, 3, 8, 9)
    runs = segments.runs_of(chain)
    assert runs == [(first, 0, 3)]
    joint = segments.take_over(chain, runs, 5.0)
    assert (joint.parent, joint.known, joint.start) == (first, 3, 0)
    second = segments.open(chain, 0, 5.0)
    assert segments.of_block[ids(1, 2, 3, 4, 8, 9)].tolist() == [second] * 3 + [first] + [second] * 2
    assert segments.low[first] == 3


def test_where_many_chains_part_is_a_common_beginning_and_growing_turns_are_none():
    segments = Segments()
    for number in range(12):
        chain = ids(0, 1, 2, *range(10 * number + 10, 10 * number + 15))
        joint = segments.take_over(chain, segments.runs_of(chain), float(number))
        segments.open(chain, joint.start, float(number))
    assert segments.is_common[: segments.count].sum() == 1 and joint.start == 3 and joint.parent == -1
    chain = ids(0, 1, 2, *range(120, 125), 900)  # the twelfth session's next turn
    joint = segments.take_over(chain, segments.runs_of(chain), 20.0)
    assert joint.parent == segments.count - 1 and joint.start == 3


def test_the_table_finds_the_age_at_which_a_kind_comes_back():
    table = LifeTable()
    for _ in range(40):
        for _ in range(20):  # kind 0 comes back at 100 s, kind 5 never
            table.note_use(0, age_bin(100.0))
        for age in range(NUM_AGES):
            if age < age_bin(100.0):
                table.note_alive(np.zeros(20, np.int64), age)
            table.note_alive(np.full(20, 5), age)
        table.update()
    density = table.density
    assert density[0, 0] > 20 * density[5, 0]
    assert density[0, age_bin(95.0)] > 5 * density[0, 0]  # the nearer it comes
    assert (density[LEFTOVER] < density[0]).all()


def test_without_evidence_the_younger_chain_is_worth_more():
    density = LifeTable().density[:NUM_KINDS]
    assert (np.diff(density[:, 1:], axis=1) < 0).all()


def test_a_feature_that_tells_nothing_changes_no_risk():
    risk, pick = Risk(2), random.Random(0)
    for _ in range(4000):
        is_long = pick.random() < 0.5
        risk.learn(("long" if is_long else "short", pick.randrange(3)), not is_long and pick.random() < 0.8, 0.4)
    assert risk.of(("short", 0)) > 6 * risk.of(("long", 0))
    assert risk.of(("short", 1)) == pytest.approx(risk.of(("short", 2)), rel=0.25)


def test_ages_fall_into_the_bins_that_the_table_counts():
    ages = [0.0, 1.99, 2.0, 2.6, 100.0, 3600.0, 1e7]
    assert [age_bin(age) for age in ages] == age_bins(np.array(ages)).tolist()


def test_ends_of_prompts_leave_before_whole_blocks():
    auto = Auto(10)
    auto.grow(100)
    auto.on_chain(np.arange(5), np.zeros(5, bool), Request(0.0, 18, 0, has_partial_tail=True))
    auto.on_chain(np.arange(20, 25), np.zeros(5, bool), Request(10.0, 20, 0))
    assert auto.coldest(2).tolist() == [4, 3]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def at_work(capacity: int = 100) -> tuple[Auto, Clock]:
    clock = Clock()
    auto = Auto(capacity, clock, block_size=16)
    auto.grow(100_000)
    return auto, clock


def decode(auto: Auto, clock: Clock, chain: np.ndarray, steps: int) -> None:
    for _ in range(steps):
        clock.now_s += 0.1
        auto.on_access(chain)


def test_steps_of_a_request_are_no_turns_and_its_new_blocks_join_it():
    auto, clock = at_work()
    auto.on_insert(np.arange(4), np.arange(4))
    decode(auto, clock, np.arange(4), 30)
    auto.on_insert(ids(4), ids(4))
    decode(auto, clock, np.arange(5), 30)
    segments = auto._segments
    assert segments.count == 1 and set(segments.of_block[:5].tolist()) == {0}
    clock.now_s += 60
    auto.on_hit(np.arange(5))  # the user has thought and asks again
    decode(auto, clock, np.arange(5), 3)
    assert segments.count == 2 and segments.turn[1] == 1
    assert (auto._held.used, auto._shadow.used) == (5, 5)


def test_steps_of_a_minute_each_are_steps_and_turns_of_a_second_are_turns():
    auto, clock = at_work()
    auto.on_insert(np.arange(4), np.arange(4))
    for length in range(4, 14):
        auto.on_insert(ids(length), ids(length))
        clock.now_s += 60
        auto.on_access(np.arange(length))
    assert auto._requests == 1 and auto._segments.count == 1
    for turn in range(1, 4):
        clock.now_s += 1
        auto.on_hit(np.arange(13))
        decode(auto, clock, np.arange(13), 2)
        assert auto._segments.turn[auto._segments.count - 1] == turn
    assert auto._requests == 4


def test_steps_over_a_common_beginning_are_no_uses_of_it():
    auto, clock = at_work()
    for other in range(20, 220, 10):  # so many part there that it becomes a common beginning
        chain = np.array([0, 1, 2, other, other + 1])
        clock.now_s += 100
        auto.on_insert(chain, np.arange(5))
        auto.on_hit(chain[:3])
        auto.on_access(chain[:3])
        auto.on_access(chain)
    segments = auto._segments
    common = int(segments.of_block[0])
    assert segments.is_common[common]
    gap_s, requests = float(segments.gap_s[common]), auto._requests
    assert gap_s > 50
    for _ in range(5):
        clock.now_s += 0.1
        auto.on_access(chain[:3])
        auto.on_access(chain)
    assert segments.gap_s[common] == gap_s and auto._requests == requests


def test_at_work_the_longest_unused_chain_is_named_first_from_its_end_and_the_newest_blocks_last():
    auto, clock = at_work()
    for chain in (np.arange(3), np.arange(10, 13)):
        auto.on_insert(chain, np.arange(3))
        decode(auto, clock, chain, 2)
        clock.now_s += 60
    auto.on_insert(ids(20), ids(0))
    everything = ids(20, 11, 12, 10, 2, 0, 1)
    assert auto.victims(7, everything).tolist() == [2, 1, 0, 12, 11, 10, 20]
    auto.on_release(ids(12))
    assert auto.victims(1, everything).tolist() == [12]
    decode(auto, clock, ids(10, 11, 12), 1)
    assert auto.victims(1, everything).tolist() == [2]


def test_an_id_that_names_another_block_now_has_no_past():
    auto, clock = at_work()
    auto.on_insert(np.arange(3), np.arange(3))
    decode(auto, clock, np.arange(3), 2)
    auto.on_release(np.arange(3))
    auto.on_forget(np.arange(3))
    clock.now_s += 60
    auto.on_insert(np.arange(3), np.arange(3))
    decode(auto, clock, np.arange(3), 2)
    assert auto._segments.turn[: auto._segments.count].tolist() == [0, 0]
    assert auto.rank(ids(0))[0] >= 0


def test_at_work_it_learns_as_in_a_replay_and_its_memory_stays_bounded(monkeypatch):
    monkeypatch.setattr("kvtier.pager.policies.auto._SPARE_SEGMENTS", 200)
    auto, clock = at_work(120)
    auto._most_segments = 200
    free = list(range(99_999, -1, -1))
    of_id: dict[int, int] = {}
    for at_s, names, _ in two_kinds_of_chats(7):
        clock.now_s = max(clock.now_s, at_s)
        new = [name for name in names if name not in of_id]
        for name in new:
            of_id[name] = free.pop()
        chain = np.array([of_id[name] for name in names])
        depth = np.arange(len(names))
        auto.on_insert(chain[len(names) - len(new) :], depth[len(names) - len(new) :])
        auto.on_hit(chain[: len(names) - len(new)])
        auto.on_access(chain)
        if len(of_id) > 6000:  # the pager forgets what left all tiers
            gone = list(of_id)[:500]
            auto.on_forget(np.array([of_id[name] for name in gone]))
            free += [of_id.pop(name) for name in gone]
    assert auto.order.name == "density"
    segments = auto._segments
    assert segments.count < 2500 and len(segments.chain) == segments.count
    assert set(np.unique(segments.of_block).tolist()) <= set(range(-1, segments.count))
    for shelf in (auto._held, auto._shadow):
        held = np.maximum(shelf.high[: segments.count] - segments.low[: segments.count], 0)
        assert shelf.used == held.sum() <= 120


def test_a_step_that_reads_only_the_end_of_a_chain_is_a_use_and_nothing_to_learn_from():
    auto, clock = at_work()
    for chain in (np.arange(4), np.arange(10, 14)):
        auto.on_insert(chain, np.arange(4))
        decode(auto, clock, chain, 1)
        clock.now_s += 60
    auto.on_access(ids(3))
    assert auto._segments.count == 2
    assert auto.victims(1, np.arange(14)[[0, 1, 2, 3, 10, 11, 12, 13]]).tolist() == [13]


def test_blocks_whose_chain_nobody_told_leave_by_their_last_use():
    auto, clock = at_work()
    clock.now_s = 100.0
    auto.on_insert(np.arange(3), np.zeros(3, np.int64))  # found in a store at start
    clock.now_s += 50
    auto.on_insert(np.arange(10, 13), np.arange(3))
    decode(auto, clock, np.arange(10, 13), 1)
    clock.now_s += 50
    auto.on_access(ids(1, 2))
    assert auto.victims(4, ids(0, 1, 2, 10, 11, 12)).tolist() == [0, 12, 11, 10]
