from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest

from kvtier.pager.policies.queues import Queues


@pytest.mark.parametrize("seed", range(5))
def test_queues_agree_with_ordered_dictionaries(seed):
    pick = random.Random(seed)
    queues, model = Queues(3), [OrderedDict[int, None]() for _ in range(3)]
    queues.grow(300)
    for _ in range(2000):
        blocks = pick.sample(range(300), pick.randrange(1, 12))
        if pick.random() < 0.75:
            queue = pick.randrange(3)
            queues.push(queue, np.array(blocks))
            for block in blocks:
                for one in model:
                    one.pop(block, None)
                model[queue][block] = None
        else:
            held = [b for b in blocks if any(b in one for one in model)]
            queues.remove(np.array(held, np.int64))
            for block in held:
                for one in model:
                    one.pop(block, None)
        queue, n = pick.randrange(3), pick.randrange(8)
        assert queues.oldest(queue, n).tolist() == list(model[queue])[:n]
        assert queues.size == [len(one) for one in model]


def test_blocks_that_stay_at_the_old_end_do_not_make_reading_slow():
    queues = Queues(1)
    queues.grow(100)
    queues.push(0, np.arange(2))
    for _ in range(20_000):
        queues.push(0, np.arange(2, 20))
        assert queues.oldest(0, 3).tolist() == [0, 1, 2]
    assert queues._end[0] - queues._head[0] < 20_000  # stale entries behind 0 and 1 were taken out
    assert queues._stale_seen[0] <= 20_000


def test_a_mark_stays_at_its_block_when_the_log_is_compacted():
    queues = Queues(1)
    queues.grow(4000)
    queues.push(0, np.arange(1000))
    queues.mark[0] = queues.behind(0, 499)
    for _ in range(40):
        queues.push(0, np.arange(600, 1000))
    assert queues.scan(0, 100)[:5].tolist() == [500, 501, 502, 503, 504]
    assert queues.behind(0, 999) == 0  # behind the youngest it is at the old end again
