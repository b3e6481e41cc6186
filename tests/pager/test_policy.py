from __future__ import annotations

import numpy as np
import pytest

from kvtier.pager.policy import LruPolicy, SlidingWindowPolicy, make_policy
from kvtier.tiers.errors import ConfigError


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int64)


def filled(policy: LruPolicy, n: int = 6) -> LruPolicy:
    policy.on_insert(np.arange(n), 1, np.arange(n))
    return policy


def test_lru_names_the_least_recent_first():
    policy = filled(LruPolicy())
    policy.on_access(ids(0, 1, 2), 5)
    policy.on_access(ids(4), 3)
    assert policy.victims(3, np.arange(6)).tolist() == [5, 3, 4]


def test_a_chain_leaves_from_its_end():
    policy = filled(LruPolicy())
    assert policy.victims(6, np.arange(6)).tolist() == [5, 4, 3, 2, 1, 0]


def test_victims_come_only_from_the_candidates():
    policy = filled(LruPolicy())
    assert policy.victims(10, ids(2, 4)).tolist() == [4, 2]
    assert policy.victims(0, ids(2, 4)).tolist() == []
    assert policy.victims(3, ids()).tolist() == []


def test_released_blocks_leave_first():
    policy = filled(LruPolicy())
    policy.on_access(np.arange(6), 9)
    policy.on_release(ids(1))
    assert policy.victims(1, np.arange(6)).tolist() == [1]


def test_naming_victims_changes_nothing():
    policy = filled(LruPolicy())
    first = policy.victims(3, np.arange(6)).tolist()
    assert policy.victims(3, np.arange(6)).tolist() == first


def test_window_policy_keeps_sinks_and_window():
    policy = SlidingWindowPolicy(window_tokens=8, sink_tokens=4, block_size=4)
    filled(policy)
    distance = (5 - np.arange(6)) * 4
    policy.on_access(np.arange(6), 2, distance)
    assert policy.victims(3, np.arange(6)).tolist() == [3, 2, 1]  # outside the window, from the chain's end
    assert policy.victims(6, np.arange(6)).tolist()[-1] == 0  # the sink is the last to go


def test_policies_grow_with_block_ids():
    policy = LruPolicy()
    policy.on_insert(ids(5000), 1, ids(0))
    assert policy.victims(1, ids(5000)).tolist() == [5000]


def test_unknown_policy_names_the_known_ones():
    with pytest.raises(ConfigError, match="lru or sliding_window"):
        make_policy("mru", window=None, sinks=0, block_size=4)
    with pytest.raises(ConfigError, match="window"):
        make_policy("sliding_window", window=None, sinks=0, block_size=4)
