"""Verbs with ids that mean something, in any order: the books and the bytes of slots are what each caller was told.

A failure says `again: python tests/simulation/sim_verbs.py SEED STEPS`. --seed N runs N * 1000 and following.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import sim_verbs

SEEDS, STEPS = 3, 500


def test_no_order_of_verbs_confuses_the_books(seed):
    counts: Counter[str] = Counter()
    for number in range(SEEDS):
        counts += sim_verbs.run(1000 * seed + number, STEPS).counts
    assert all(
        counts[what] for what in ("reserve", "commit", "lease", "release", "read", "send_rest", "kill", "kill_in_write")
    )


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_orders_of_verbs(seed):
    for number in range(400):
        sim_verbs.run(1_000_000 + 1000 * seed + number)
