"""Every policy that a pager can have, in a pager whose tiers are too small, every value checked."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.policies.registry import NAMES

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, LAYOUT, WINDOWED, Rig

DISK_BLOCK = 4096  # of a store, for one block of the rig


def talk(rig, seed: int, steps: int = 24) -> None:
    """Chats that share a beginning, take turns, grow, and end."""
    pick = random.Random(seed)
    prompt = [7] * 9
    seqs: list[int] = []
    for _ in range(steps):
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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_chats_stay_exact_where_every_tier_is_too_small(name, tmp_path):
    """Ghosts, hands and shares of three tiers, of which the lowest loses blocks too."""
    rig = Rig(4, pages=10, host=20, policy=name, window=8, path=tmp_path, nvme_bytes=24 * DISK_BLOCK)
    talk(rig, 4, 120)
    assert rig.pager.counters.get("evicted_blocks", tier="host") > 0
    assert rig.pager.counters.get("evicted_blocks", tier="nvme") > 0
    rig.close()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_pinned_for_a_time_or_in_use_stays_under_every_policy(name):
    rig = Rig(6, pages=12, host=60, policy=name, window=8)
    kept = rig.start(list(range(12)))
    rig.prefill(kept)
    rig.pager.pin(kept, 1000.0)
    blocks = rig.pager._core.sequences[kept].tables[0].ids.copy()
    for start in range(100, 600, 50):
        other = rig.start(list(range(start, start + 20)))
        rig.prefill(other)
        rig.pager.finish(other)
        assert rig.pager._core.groups[0].directory.in_device(blocks).all()
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == [] and rig.pager.counters.get("evicted_blocks", tier="device") > 0


@pytest.mark.parametrize("name", ["2q", "arc", "sieve", "s3fifo", "gdsf", "wtinylfu", "prefix"])
def test_each_tier_keeps_books_of_what_it_holds(name, tmp_path):
    """What a rule believes to be in its tier is what the directory says, whatever came and went."""
    rig = Rig(7, pages=10, host=20, policy=name, path=tmp_path, nvme_bytes=24 * DISK_BLOCK)
    talk(rig, 7, 120)
    group = rig.pager._core.groups[0]
    for tier, place in (("device", "page"), ("host", "host_slot"), ("nvme", "nvme_slot")):
        held = set(np.flatnonzero(getattr(group.directory, place) >= 0).tolist())
        believed = set(np.flatnonzero(group.policy.of(tier).queues.place >= 0).tolist())
        assert believed == held, tier
    rig.close()


def test_a_prompt_that_comes_back_after_it_left_every_tier_is_known_to_arc():
    rig = Rig(8, pages=12, host=12, policy="arc")
    prompt = list(range(16))
    for start in (None, *range(100, 500, 40), None):
        seq = rig.start(prompt if start is None else list(range(start, start + 24)))
        rig.prefill(seq)
        rig.pager.finish(seq)
    rig.settle()
    group = rig.pager._core.groups[0]
    found = group.directory.find(rig.pager.block_keys(rig.start([*prompt, 1]), 0, 12))
    assert rig.pager.counters.get("ghost_tokens") > 0
    assert (group.policy.of("device").queues.queue_of(found) == 2).all()  # the list of those used again
    assert rig.wrong == []


def test_victims_of_a_large_pool_come_from_a_part_that_moves_on(monkeypatch):
    monkeypatch.setattr("kvtier.pager.leaving.WINDOW_PAGES", 2)
    monkeypatch.setattr("kvtier.pager.leaving.PAGES_PER_VICTIM", 1)
    rig = Rig(0, pages=16, host=60)
    for start in (0, 100):
        rig.prefill(rig.start(list(range(start, start + 28))))
    rig.settle()
    group = rig.pager._core.groups[0]
    rig.pager._core.write_back(group, 8, "writeback")
    rig.settle()
    asked: list[int] = []
    victims = group.policy.victims
    monkeypatch.setattr(group.policy, "victims", lambda n, c: asked.append(len(c)) or victims(n, c))
    clean = np.flatnonzero(group.leaving.evictable())
    seen: set[int] = set()
    for _ in range(8):
        seen |= set(group.leaving.first_pages(1).tolist())
    assert max(asked) <= 2 < len(clean) and len(seen) > 1
    assert len(group.leaving.first_pages(len(clean))) == len(clean)  # as many as there are, when so many are asked for


@pytest.mark.parametrize("name", ["auto", "lru", "arc"])
def test_of_windowed_layers_what_is_out_of_every_window_leaves_before_what_somebody_will_read(name):
    rig = Rig(9, pages=24, host=80, layouts=[LAYOUT, WINDOWED], policy=name)
    waiting = rig.start(list(range(500, 512)))
    rig.prefill(waiting)
    running = rig.start(list(range(40)))
    rig.prefill(running)
    rig.settle()
    windowed, sequences = rig.pager._core.groups[1], rig.pager._core.sequences
    rig.pager.drain()
    rig.pager._core.write_back(windowed, 100, "writeback")
    rig.settle()
    in_windows = np.concatenate([sequences[seq].tables[1].ids for seq in (waiting, running)])
    clean = windowed.pages.block[windowed.leaving.evictable()]
    out = clean[~np.isin(clean, in_windows)]
    assert len(out) > 2 and np.isin(clean, in_windows).any()
    order = windowed.leaving.first_pages(len(clean))
    assert set(order[: len(out)].tolist()) == set(out.tolist())  # though all of these were used after those that wait
    rig.say(running, [1, 2, 3])
    assert rig.wrong == []


def test_a_block_that_another_window_still_sees_is_not_the_first_to_leave():
    rig = Rig(10, pages=24, host=80, layouts=[LAYOUT, WINDOWED])
    first = rig.start(list(range(12)))
    rig.prefill(first)
    second = rig.pager.fork(first)
    rig.pager.append(second, list(range(100, 120)))
    rig.prefill(second)
    windowed, sequences = rig.pager._core.groups[1], rig.pager._core.sequences
    seen = sequences[first].tables[1].ids
    seen = seen[seen >= 0]
    left = sequences[second].tables[1].ids[: len(seen)]
    assert (left < 0).any() and not windowed.directory.is_demoted[seen].any()


@pytest.mark.parametrize("step_s", [0.1, 60.0])
def test_a_request_counts_once_however_slow_its_steps_are(step_s):
    now = [0.0]
    rigs = {name: Rig(11, pages=24, host=60, policy=name, clock=lambda: now[0]) for name in ("auto", "lfu")}
    for rig in rigs.values():
        seq = rig.start(list(range(8)))
        for turn in range(3):
            if turn:
                rig.pager.turn(seq, [100 + turn])
            for _ in range(6):
                rig.prefill(seq, chunk=2)
                rig.pager.append(seq, [7])
                now[0] += step_s
            rig.prefill(seq)
        rig.settle()
        assert rig.wrong == []
    assert rigs["auto"].pager._core.groups[0].policy._requests == 3
    d = rigs["lfu"].pager._core.groups[0]
    root = d.directory.by_key[rigs["lfu"].pager.block_keys(seq, 0, BLOCK)[0]]
    assert d.policy._uses[root] == 3  # stored by the first request, used by two more
