from __future__ import annotations

import numpy as np
import pytest

from kvtier.pager.policies.base import Request
from kvtier.pager.policies.importance import Importance
from kvtier.pager.policies.lru import Lru
from kvtier.pager.policies.prefix_aware import PrefixAware
from kvtier.pager.policies.registry import NAMES, Setting, make_policy, make_policy_of_tiers
from kvtier.pager.policies.window import SlidingWindow
from kvtier.tiers.errors import ConfigError


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int64)


def made(name: str, capacity: int = 100, num_ids: int = 1000):
    policy = make_policy(name, Setting(capacity, 4, window=16, sinks=4))
    policy.grow(num_ids)
    return policy


class Tier:
    """What a policy is asked to keep: it says who leaves, this checks that it only names what is held."""

    def __init__(self, policy, capacity: int) -> None:
        self.policy, self.capacity, self.held, self.now_s = policy, capacity, set(), 0.0

    def use(self, *blocks: int, tokens: int = 0) -> int:
        self.now_s += 10.0
        chain = ids(*blocks)
        was_held = np.array([block in self.held for block in blocks])
        hits = int(was_held.argmin()) if not was_held.all() else len(blocks)
        self.policy.on_chain(chain, was_held, Request(self.now_s, tokens or 4 * len(blocks), 8))
        self.held |= set(blocks)
        surplus = len(self.held) - self.capacity
        if surplus > 0:
            leaving = self.policy.coldest(surplus)
            assert len(leaving) == surplus and len(set(leaving.tolist())) == surplus
            assert set(leaving.tolist()) <= self.held
            self.policy.on_evict(leaving)
            self.held -= set(leaving.tolist())
        return hits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_happens_a_policy_names_as_many_held_blocks_as_must_leave(name, seed):
    pick = np.random.default_rng(seed)
    capacity = int(pick.integers(5, 60))
    tier = Tier(made(name, capacity), capacity)
    sessions = [list(range(20 * s, 20 * s + 20)) for s in range(40)]
    for _ in range(600):
        session = sessions[int(pick.zipf(1.5)) % 40]
        length = int(pick.integers(1, 20))
        tier.use(*([999, *session] if session[0] % 40 else session)[:length])
        if pick.random() < 0.05:
            released = np.array(session[length // 2 : length], np.int64)
            tier.policy.on_release(np.array([b for b in released.tolist() if b in tier.held], np.int64))


@pytest.mark.parametrize("name", NAMES)
def test_released_blocks_leave_first(name):
    tier = Tier(made(name, 12), 12)
    tier.use(1, 2, 3, 4)
    tier.use(11, 12, 13, 14)
    tier.use(21, 22, 23, 24)
    tier.policy.on_release(ids(13, 14))
    tier.use(31, 32)
    assert not tier.held & {13, 14} and {1, 11, 12, 21} <= tier.held


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("fifo", "importance", "lfu", "auto", "2q")])
def test_a_chain_in_use_is_kept_over_one_that_was_used_once(name):
    tier = Tier(made(name, 40), 40)
    for turn in range(6):
        tier.use(1, 2, 3, 4, 5)
        tier.use(*range(100 + 10 * turn, 107 + 10 * turn))
    assert tier.use(1, 2, 3, 4, 5) == 5


@pytest.mark.parametrize("name", NAMES)
def test_victims_come_only_from_the_candidates_and_naming_them_changes_nothing(name):
    policy = made(name)
    policy.on_insert(np.arange(6), np.arange(6))
    assert sorted(policy.victims(10, ids(2, 4)).tolist()) == [2, 4]
    assert policy.victims(0, ids(2, 4)).tolist() == policy.victims(3, ids()).tolist() == []
    assert policy.victims(3, np.arange(6)).tolist() == policy.victims(3, np.arange(6)).tolist()
    policy.on_forget(ids(2))
    policy.on_insert(ids(2), ids(0))  # the id names another block now
    assert len(policy.victims(6, np.arange(6))) == 6


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_leaves_from_its_end(name):
    policy = made(name)
    policy.on_insert(np.arange(6), np.arange(6))
    assert policy.victims(6, np.arange(6)).tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_released_block_that_is_used_after_all_is_not_the_first_to_leave(name):
    policy = made(name)
    policy.on_insert(np.arange(6), np.arange(6))
    policy.on_release(ids(0, 1))
    policy.on_access(ids(0, 1))
    assert policy.victims(2, np.arange(6)).tolist() != [1, 0]


@pytest.mark.parametrize("name", ["arc", "2q", "sieve", "s3fifo", "gdsf", "wtinylfu", "prefix"])
@pytest.mark.parametrize("seed", range(4))
def test_where_every_block_may_leave_a_pager_at_work_chooses_as_a_replay_does(name, seed):
    """The same requests, told to one that names the coldest of all and to one that chooses among candidates."""
    pick, capacity = np.random.default_rng(seed), 30
    replayed, live = made(name, capacity), made(name, capacity)
    held: set[int] = set()
    for _ in range(800):
        block = int(pick.zipf(1.4)) % 90
        one, was_held = ids(block), block in held
        for policy in (replayed, live):
            policy.depth[one] = 0
            policy.on_hit(one) if was_held else policy.on_insert(one, ids(0))
        held.add(block)
        if len(held) > capacity:
            wanted = replayed.coldest(1)
            chosen = live.victims(1, np.array(sorted(held), np.int64))
            assert chosen.tolist() == wanted.tolist()
            replayed.on_evict(wanted)
            live.on_leave(chosen)
            held -= set(chosen.tolist())


@pytest.mark.parametrize("name", ["arc", "2q", "sieve", "s3fifo", "gdsf", "wtinylfu", "prefix"])
def test_what_may_not_leave_is_passed_over_and_whatever_may_is_named_once(name):
    pick, policy = np.random.default_rng(5), made(name, 30)
    held: list[int] = []
    for number in range(400):
        block = ids(number)
        policy.on_insert(block, ids(0))
        held.append(number)
        policy.on_hit(np.unique(pick.choice(held, 3)))
        pinned = set(pick.choice(held, len(held) // 2, replace=False).tolist())
        free = np.array([b for b in held if b not in pinned], np.int64)
        count = min(int(pick.integers(0, 6)), len(free))
        before = policy.victims(len(free), free).tolist()
        assert sorted(before) == sorted(free.tolist())
        chosen = policy.victims(count, free)
        assert chosen.tolist() == before[:count] or name == "wtinylfu"  # there as many compete as are asked for
        policy.on_leave(chosen)
        held = [b for b in held if b not in set(chosen.tolist())]


def by_tier(name: str, **capacities: int):
    tiers = {tier: (blocks, lambda: float("inf")) for tier, blocks in capacities.items()}
    policy = make_policy_of_tiers(name, Setting(sum(capacities.values()), 4), tiers)
    policy.grow(1000)
    return policy


def test_each_tier_has_a_hand_of_its_own():
    policy = by_tier("sieve", device=4, host=8)
    blocks = np.arange(4)
    policy.on_insert(blocks, ids(0, 0, 0, 0))
    for tier in ("device", "host"):
        policy.entered(tier, blocks)
    policy.on_hit(ids(3))
    assert policy.of("device").victims(1, blocks).tolist() == [2]
    policy.left("device", ids(2))
    assert policy.of("device").victims(3, ids(0, 1, 3)).tolist() == [1, 0, 3]
    assert policy.of("host").victims(4, blocks).tolist() == [2, 1, 0, 3]  # there the hand has not moved


@pytest.mark.parametrize("name", ["arc", "2q", "s3fifo"])
def test_a_tier_remembers_who_left_it_for_the_one_below(name):
    policy = by_tier(name, device=20, host=100)
    blocks = np.arange(40)
    policy.on_insert(blocks, np.zeros(40, np.int64))
    policy.entered("host", blocks)
    policy.entered("device", blocks[:20])
    policy.left("device", ids(0))
    policy.entered("device", ids(0))
    policy.entered("device", blocks[20:])
    assert policy.of("device").queues.queue_of(blocks).tolist() == [2, *39 * [1]]  # 2: of those used again
    assert policy.of("host").queues.queue_of(blocks).tolist() == 40 * [1]


@pytest.mark.parametrize("name", ["arc", "2q", "s3fifo"])
def test_who_left_every_tier_is_known_again_by_its_key(name):
    policy, key = by_tier(name, host=20), b"k" * 32
    policy.on_insert(ids(0), ids(0))
    policy.entered("host", ids(0))
    policy.left("host", ids(0))
    policy.gone(0, key)
    policy.on_forget(ids(0))
    policy.on_insert(np.arange(20), np.zeros(20, np.int64))  # its id is another's now
    policy.entered("host", np.arange(20))
    policy.named(7, key)
    policy.named(8, key)  # told once
    queue = policy.of("host").queues.queue_of(np.arange(20))
    assert np.flatnonzero(queue == 2).tolist() == [7] and (np.delete(queue, 7) == 1).all()


def test_wtinylfu_remembers_how_often_a_key_was_asked_for():
    policy, key = by_tier("wtinylfu", host=100), b"k" * 32
    policy.on_insert(ids(0), ids(0))
    policy.entered("host", ids(0))
    for _ in range(5):
        policy.on_hit(ids(0))
    policy.gone(0, key)
    policy.on_forget(ids(0))
    policy.on_insert(ids(1), ids(0))
    policy.entered("host", ids(1))
    policy.named(1, key)
    assert policy.of("host").memory_of(1) == 7  # six uses and this one


def test_no_more_keys_are_remembered_than_the_tiers_have_blocks():
    policy = by_tier("arc", device=3, host=5)
    for number in range(50):
        policy.gone(0, number.to_bytes(32, "big"))
    assert len(policy._remembered) == 8


def test_lru_names_the_least_recent_first():
    policy = made("lru")
    policy.on_insert(np.arange(6), np.arange(6))
    policy.on_access(ids(4))
    policy.on_access(ids(0, 1, 2))
    assert policy.victims(3, np.arange(6)).tolist() == policy.coldest(3).tolist() == [5, 3, 4]


def test_slru_keeps_what_a_second_request_used_and_steps_do_not_count():
    policy = made("slru", 10)
    policy.on_insert(np.arange(6), np.arange(6))
    policy.on_hit(ids(0, 1))
    for _ in range(3):
        policy.on_access(ids(4, 5))
    assert policy.victims(4, np.arange(6)).tolist() == [3, 2, 5, 4]


def test_lfu_counts_a_request_once_however_many_steps_it_takes():
    policy = made("lfu")
    policy.on_insert(np.arange(4), np.arange(4))
    policy.on_hit(ids(2))
    for _ in range(5):
        policy.on_access(ids(3))
    assert policy.victims(4, np.arange(4)).tolist() == [3, 1, 0, 2]


def test_sieve_passes_over_what_was_used_and_goes_on_from_there():
    tier = Tier(made("sieve", 4), 4)
    for block in (1, 2, 3, 4):
        tier.use(block)
    tier.use(1)
    tier.use(5)
    assert tier.held == {1, 3, 4, 5}  # 1 had its bit, 2 left
    tier.use(6)
    assert tier.held == {1, 4, 5, 6}  # the hand stands behind 2, so 3 is next and not 1


@pytest.mark.parametrize("name", ["2q", "s3fifo"])
def test_who_comes_back_as_a_ghost_stays_longer(name):
    tier = Tier(made(name, 20), 20)
    tier.use(1, 2)
    for start in range(100, 124, 3):
        tier.use(start, start + 1, start + 2)
    assert not tier.held & {1, 2}
    tier.use(1, 2)
    for start in range(200, 230, 3):
        tier.use(start, start + 1, start + 2)
    assert {1, 2} <= tier.held


def test_arc_gives_room_to_the_list_whose_ghosts_come_back():
    policy = made("arc", 20)
    tier = Tier(policy, 20)
    for _ in range(2):
        tier.use(*range(10))
    tier.use(*range(100, 115))  # five of these leave at once and become ghosts
    ghosts = set(range(100, 115)) - tier.held
    assert len(ghosts) == 5 and policy._target == 0
    tier.use(*sorted(ghosts))
    assert policy._target >= 5 and ghosts <= tier.held


def test_wtinylfu_turns_newcomers_away_that_are_asked_for_less():
    tier = Tier(made("wtinylfu", 100), 100)
    for _ in range(3):
        tier.use(*range(100))
    for start in range(200, 800, 20):
        tier.use(*range(start, start + 20))
    assert len(tier.held & set(range(100))) > 90


def test_gdsf_forgets_what_was_popular_once():
    tier = Tier(made("gdsf", 10), 10)
    for _ in range(5):
        tier.use(1, 2)
    for start in range(100, 400, 3):
        tier.use(start, start + 1, start + 2)
    assert not tier.held & {1, 2}


def test_prefix_keeps_the_chain_that_is_dearer_to_have_back():
    def survivors(load_cost: float) -> set[int]:
        policy = PrefixAware(300, 512, lambda: load_cost)
        policy.grow(1000)
        tier = Tier(policy, 300)
        tier.use(*range(200, 400))  # deep: computing it again costs more per block
        tier.use(*range(50))
        tier.use(*range(500, 570))
        return tier.held

    assert 399 in survivors(float("inf")) and 49 not in survivors(float("inf"))
    assert 399 not in survivors(1.0)  # loading is as cheap for all: recency decides


def test_importance_lets_go_of_what_draws_no_attention():
    policy = Importance(10)
    policy.on_insert(np.arange(4), np.arange(4))
    for _ in range(10):
        policy.on_mass(np.arange(4), np.array([1.0, 0.01, 0.5, 0.02]))
    assert set(policy.victims(2, np.arange(4)).tolist()) == set(policy.coldest(2).tolist()) == {1, 3}
    assert policy.victims(4, np.arange(4)).tolist()[-1] == 0


def test_window_policy_keeps_sinks_and_window():
    policy = SlidingWindow(100, window_tokens=8, sink_tokens=4, block_size=4)
    policy.on_insert(np.arange(6), np.arange(6))
    policy.on_access(np.arange(6), (5 - np.arange(6)) * 4)
    assert policy.victims(3, np.arange(6)).tolist() == [3, 2, 1]  # outside the window, from the chain's end
    assert policy.victims(6, np.arange(6)).tolist()[-1] == 0  # the sink is the last to go


def test_policies_grow_with_block_ids():
    policy = Lru(10)
    policy.grow(5001)
    policy.on_insert(ids(5000), ids(0))
    assert policy.victims(1, ids(5000)).tolist() == [5000]


def test_unknown_policy_names_the_known_ones():
    with pytest.raises(ConfigError, match="'mru' is unknown; choose one of auto, lru"):
        make_policy("mru", Setting(10, 4))
    with pytest.raises(ConfigError, match="window=None"):
        make_policy("sliding_window", Setting(10, 4))
