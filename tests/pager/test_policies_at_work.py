"""Every policy that a pager can have, in a pager whose tiers are too small, every value checked."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.config import PagerConfig
from kvtier.pager.pager import Pager
from kvtier.pager.policies.registry import LIVE_NAMES, NAMES
from kvtier.tiers.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from harness import LAYOUT, WINDOWED, Rig


def talk(rig, seed: int) -> None:
    """Chats that share a beginning, take turns, grow, and end."""
    pick = random.Random(seed)
    prompt = [7] * 9
    seqs: list[int] = []
    for _ in range(24):
        if len(seqs) < 5 and pick.random() < 0.5:
            seqs.append(rig.start([*prompt, *(pick.randrange(50) for _ in range(pick.randrange(1, 12)))]))
            rig.prefill(seqs[-1])
        elif seqs and pick.random() < 0.2:
            rig.pager.finish(seqs.pop(pick.randrange(len(seqs))))
        elif seqs:
            rig.say(pick.choice(seqs), [pick.randrange(50) for _ in range(pick.randrange(1, 4))])
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == []
    assert rig.pager.counters.get("evicted_blocks", tier="device") > 0


@pytest.mark.parametrize("name", LIVE_NAMES)
@pytest.mark.parametrize("window_pages", [2, 4096])
def test_chats_stay_exact_under_every_policy(name, window_pages, monkeypatch):
    monkeypatch.setattr("kvtier.pager.leaving.WINDOW_PAGES", window_pages)
    monkeypatch.setattr("kvtier.pager.leaving.PAGES_PER_VICTIM", 1)
    for seed in (1, 2):
        talk(Rig(seed, pages=10, host=60, policy=name, window=8), seed)


def test_auto_orders_full_layers_and_leaves_windowed_ones_to_recency():
    rig = Rig(3, pages=24, host=80, layouts=[LAYOUT, WINDOWED], policy="auto")
    assert [group.policy.name for group in rig.pager._core.groups] == ["auto", "lru"]
    talk_to = rig.start(list(range(30)))
    assert rig.prefill(talk_to) == 30
    rig.settle()
    assert rig.wrong == []


def test_a_policy_that_a_pager_cannot_feed_is_refused_by_name():
    for name in set(NAMES) - set(LIVE_NAMES):
        with pytest.raises(ConfigError, match=f"'{name}' is for kvtier replay only so far; choose one of auto, lru"):
            Pager.open(LAYOUT, PagerConfig(device_bytes="1MiB", host_bytes=0, backend="cpu", policy=name))


def test_victims_of_a_large_pool_come_from_a_part_that_moves_on(monkeypatch):
    monkeypatch.setattr("kvtier.pager.leaving.WINDOW_PAGES", 2)
    monkeypatch.setattr("kvtier.pager.leaving.PAGES_PER_VICTIM", 1)
    rig = Rig(0, pages=16, host=60)
    for start in (0, 100):
        rig.prefill(rig.start(list(range(start, start + 28))))
    rig.settle()
    group = rig.pager._core.groups[0]
    asked: list[int] = []
    victims = group.policy.victims
    monkeypatch.setattr(group.policy, "victims", lambda n, c: asked.append(len(c)) or victims(n, c))
    clean = np.flatnonzero(group.leaving.evictable())
    seen: set[int] = set()
    for _ in range(8):
        seen |= set(group.leaving.first_pages(1).tolist())
    assert max(asked) <= 2 < len(clean) and len(seen) > 1
    assert len(group.leaving.first_pages(len(clean))) == len(clean)  # as many as there are, when so many are asked for
